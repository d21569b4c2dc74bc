"""The training run: attention without MLPs or norms, on pieces that come back, with two choices that make it clear.

Positions begin as sinusoids, in which "the one before" is a rotation, so that a previous-token head is found soon. The
head h of a layer begins at 4 ** -h of the first one's size, and attention weights follow plain gradient descent, under
which what leads grows fastest; so one head does each job. With AdamW and equal sizes all four heads share it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from mechscope.labs import shelf, training
from mechscope.labs.induction.sequences import tiled
from mechscope.labs.training import Progress

if TYPE_CHECKING:
    from mechscope.labs.toy import ToyTransformer


@dataclass(frozen=True)
class Recipe:
    """This is everything that decides the weights, apart from the versions of the libraries."""

    seed: int = 0
    n_layers: int = 2
    steps: int = 800
    rows: int = 64
    total: int = 48
    vocab: int = 48
    shortest: int = 8
    longest: int = 22
    filler: int = 8
    d_model: int = 64
    n_heads: int = 4
    d_head: int = 32
    attention_lr: float = 0.3
    embedding_lr: float = 3e-3
    attention_size: float = 0.1  # standard deviation of the first head's weights at the beginning
    warmup: int = 100
    smeared_keys: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def measured(self) -> list[int]:
        """This is the steps whose models are kept and measured: close together while the heads form."""
        eighth, steps = self.steps // 8, range(0, self.steps + 1)
        first, last = (eighth, 2 * eighth) if self.smeared_keys else (3 * eighth, 6 * eighth)
        dense = steps[first : last + 1 : max(1, self.steps // (80 if self.smeared_keys else 40))]
        return sorted({*steps[:: max(1, eighth)], *dense, self.steps})


def new_model(recipe: Recipe) -> ToyTransformer:
    """This is the untrained model of a recipe: the same seed gives the same weights, so it is also the trained
    model's untrained twin."""
    from mechscope.labs.toy import ToyConfig, ToyTransformer

    config = ToyConfig(
        vocab_size=recipe.vocab,
        hidden_size=recipe.d_model,
        num_hidden_layers=recipe.n_layers,
        num_attention_heads=recipe.n_heads,
        head_dim=recipe.d_head,
        max_position_embeddings=recipe.total,
        smeared_keys=recipe.smeared_keys,
    )
    sizes = recipe.attention_size * 0.25 ** torch.arange(recipe.n_heads).repeat_interleave(recipe.d_head)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(recipe.seed)
        model = ToyTransformer(config)
        model.embed.weight.normal_(std=0.7)
        positions(model).copy_(sinusoids(recipe.total, recipe.d_model))
        model.unembed.weight.normal_(std=recipe.d_model**-0.5)
        for block in model.blocks:
            attn: Any = block.attn
            for project in (attn.q_proj, attn.k_proj, attn.v_proj):
                project.weight.normal_().mul_(sizes[:, None])
            attn.o_proj.weight.normal_().mul_(sizes)
    return model.train()


def positions(model: ToyTransformer) -> Tensor:
    """This is the embeddings of a model's positions, [pos d_model]."""
    assert model.pos_embed is not None
    return model.pos_embed.weight


def sinusoids(n: int, width: int) -> Tensor:
    """This is [n width]: sines, then cosines, of wavelengths from 2 pi to 2000 pi (Vaswani et al. 2017)."""
    angles = torch.arange(n)[:, None] * torch.exp(-torch.arange(width // 2) * (math.log(1000.0) * 2 / width))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def batch(recipe: Recipe, step: int) -> tuple[Tensor, Tensor]:
    """This is the ids [rows total] of a step, and which of them [rows total] an earlier copy announces."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    lengths = (recipe.shortest, recipe.longest)
    ids, start, length = tiled(recipe.rows, recipe.total, recipe.vocab, lengths, recipe.filler, generator)
    return ids, torch.arange(recipe.total) > (start + length)[:, None]


def train(
    recipe: Recipe,
    folder: Path,
    stop_after: int | None = None,
    on_measured: Callable[[int], None] = lambda step: None,
) -> tuple[ToyTransformer, Progress]:
    """This trains a model, or continues the run that `folder` holds, and returns it with its record.

    The models of `recipe.measured()` go to `folder`/step-NNNNN, and `on_measured` is told. stop_after: the step to end
    at early, as a kill would. Raises MechscopeError when the folder holds a run of another recipe.
    """
    model = new_model(recipe)
    attention = list(model.blocks.parameters())
    others = [model.embed.weight, positions(model), model.unembed.weight]
    optimisers = [
        torch.optim.SGD(attention, lr=recipe.attention_lr, momentum=0.9),
        torch.optim.AdamW(others, lr=recipe.embedding_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]

    def loss(model: ToyTransformer, step: int) -> tuple[Tensor, dict[str, float]]:
        ids, announced = batch(recipe, step)
        logits = model(ids, use_cache=False).logits
        each = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        known = announced[:, 1:].flatten()
        return each.mean(), {"repeats": each[known].mean().item(), "others": each[~known].mean().item()}

    def on_step(step: int, model: ToyTransformer, progress: Progress) -> None:
        if step in recipe.measured():
            shelf.write(folder / f"step-{step:05d}", model)
            on_measured(step)

    progress = training.train(
        model,
        optimisers,
        loss,
        recipe.steps,
        folder,
        recipe.to_dict(),
        rate=lambda step: min((step + 1) / recipe.warmup, (recipe.steps - step) / (0.3 * recipe.steps), 1.0),
        clip=1.0,
        stop_after=stop_after,
        on_step=on_step,
    )
    return model.eval(), progress
