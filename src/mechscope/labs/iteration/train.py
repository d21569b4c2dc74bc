"""The training run: a small transformer learns to write an iteration's states, from scratch or from another task.

Positions begin as sinusoids, in which going back by the number of inputs is a rotation; learned from noise, the same
takes many times as long. A run that starts from another task's weights is the same in all else, so that the steps both
take until every held-out chain is right can be compared: how far the skill transfers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mechscope.labs import training
from mechscope.labs.induction.train import positions, sinusoids
from mechscope.labs.iteration.chains import IGNORED, Chains, chains
from mechscope.labs.training import Progress

if TYPE_CHECKING:
    from mechscope.labs.toy import ToyTransformer

EVERY = 20  # steps between judgements on held-out chains


@dataclass(frozen=True)
class Recipe:
    """This is everything that decides the weights, apart from the versions of the libraries.

    start: the task whose finished weights the run begins with, none for random ones.
    """

    task: str = "polynomial"
    start: str = ""
    seed: int = 0
    steps: int = 1200
    rows: int = 96
    longest: int = 10
    modulus: int = 7
    d_model: int = 64
    n_heads: int = 2
    d_mlp: int = 128
    lr: float = 2e-3
    warmup: int = 50

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def name(self) -> str:
        """This is what the run is called, such as "parity from copy, seed 1"."""
        return f"{self.task}{f' from {self.start}' if self.start else ''}, seed {self.seed}"


def new_model(recipe: Recipe) -> ToyTransformer:
    """This is the untrained model of a recipe: the same seed gives the same weights, so it is also the trained
    model's untrained twin."""
    from mechscope.labs.toy import ToyConfig, ToyTransformer

    config = ToyConfig(
        vocab_size=recipe.modulus + 1,  # the numbers, then END
        hidden_size=recipe.d_model,
        num_hidden_layers=2,
        num_attention_heads=recipe.n_heads,
        intermediate_size=recipe.d_mlp,
        hidden_act="gelu",
        norm="rms",
        max_position_embeddings=2 * recipe.longest,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(recipe.seed)
        model = ToyTransformer(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.7 * recipe.d_model**-0.5)
        model.embed.weight.normal_(std=0.5)
        positions(model).copy_(sinusoids(2 * recipe.longest, recipe.d_model))
    return model.train()


def drawn(recipe: Recipe, step: int) -> Chains:
    """This is the chains of a step of training."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    return chains(recipe.task, recipe.rows, recipe.longest, recipe.modulus, generator)


def held_out(recipe: Recipe, n: int = 256, seed: int = 0) -> Chains:
    """This is chains that are never trained on, of four inputs or more."""
    generator = torch.Generator().manual_seed(2**31 + seed)
    return chains(recipe.task, n, recipe.longest, recipe.modulus, generator, held_out=True, shortest=4)


@torch.no_grad()
def right(model: nn.Module, made: Chains) -> float:
    """This is the share of chains whose every state is predicted, and so written when the model goes on by itself."""
    guessed = model(made.ids, use_cache=False).logits.argmax(-1)
    return float(((guessed == made.targets) | (made.targets == IGNORED)).all(1).double().mean())


def train(
    recipe: Recipe, folder: Path, start: ToyTransformer | None = None, stop_after: int | None = None
) -> tuple[ToyTransformer, Progress]:
    """This trains a model, or continues the run that `folder` holds, and returns it with its record.

    start: the finished model of the task `recipe.start`. Every `EVERY` steps the share of held-out chains that are
    right is recorded. Raises MechscopeError when the folder holds a run of another recipe.
    """
    model = new_model(recipe)
    if start is not None:
        model.load_state_dict(start.state_dict())
    judged = held_out(recipe)

    def loss(model: ToyTransformer, step: int) -> tuple[Tensor, dict[str, float]]:
        made = drawn(recipe, step)
        logits = model(made.ids, use_cache=False).logits
        value = functional.cross_entropy(logits.flatten(0, 1), made.targets.flatten(), ignore_index=IGNORED)
        return value, {"right": right(model, judged)} if (step + 1) % EVERY == 0 or step + 1 == recipe.steps else {}

    progress = training.train(
        model,
        [torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.01)],
        loss,
        recipe.steps,
        folder,
        recipe.to_dict(),
        rate=lambda step: min((step + 1) / recipe.warmup, (recipe.steps - step) / (0.5 * recipe.steps), 1.0),
        clip=1.0,
        record=EVERY,
        stop_after=stop_after,
    )
    return model.eval(), progress


def steps_until(progress: Progress, share: float) -> int:
    """This is the first judged step at which so many held-out chains are right; one more than there are, if none is."""
    reached = [int(row["step"]) for row in progress.figures if row.get("right", -1.0) >= share]
    return min(reached, default=progress.step + 1)
