"""What can be hung into the training loop: a function of the `Training` that is called after each step.

    train(sae, batches, steps=10_000, callbacks=[resample(every=2500), lines("log.jsonl")])

A callback draws nothing that does not follow from the step, so that a run that was killed goes on exactly. Your own is
any function of one argument; `moment.logs[i]` is dictionary i's log so far.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mechscope.dictionaries.dictionary import Coder, Dictionary
from mechscope.errors import DictionaryError

if TYPE_CHECKING:
    from mechscope.dictionaries.training import Callback, Training


def resample(every: int, until: float = 0.5, dead_after: int = 100_000, seed: int = 0) -> Callback:
    """This gives latents that have not fired for `dead_after` examples a new start, every so many steps.

    A dead latent's direction becomes an input drawn with probability proportional to its squared loss; its encoder's
    row that direction at 0.2 of the mean norm of the living ones; its bias and its moments in Adam become 0. until: the
    share of the training after which nothing is resampled any more.

    Source: Bricken et al. 2023, Towards Monosemanticity, "Neuron resampling"; the batch at hand stands for their
    819,200 inputs.
    """

    @torch.no_grad()
    def again(moment: Training) -> None:
        if moment.step % every or moment.step > until * moment.steps:
            return
        for dictionary, optimiser in zip(moment.dictionaries, moment.optimisers):
            if not isinstance(dictionary, Coder):
                raise DictionaryError(f"resample knows one encoder and one decoder, not a {type(dictionary).__name__}")
            dead = (dictionary.idle > dead_after).nonzero().flatten()
            if not len(dead):
                continue
            x, target = dictionary.parts(moment.batch)
            wanted = (x if target is None else target).flatten(0, -2)
            missed = (wanted - dictionary(x, target).output.flatten(0, -2)).square().sum(1).double().square()
            draw = torch.Generator(missed.device).manual_seed(seed + moment.step)
            rows = torch.multinomial(missed, len(dead), replacement=True, generator=draw)
            living = dictionary.W_enc[dictionary.idle <= dead_after]
            size = 0.2 * (living.norm(dim=1).mean() if len(living) else 1.0)
            inner = nn.functional.normalize(dictionary.inner(x.flatten(0, -2)[rows]), dim=1)
            dictionary.W_enc[dead] = size * inner
            middle = dictionary.b_dec if dictionary.centred else 0.0
            dictionary.W_dec[dead] = nn.functional.normalize(wanted[rows] * dictionary.scale_out - middle, dim=1)
            dictionary.b_enc[dead] = 0.0
            dictionary.idle[dead] = 0
            for parameter in (dictionary.W_enc, dictionary.W_dec, dictionary.b_enc):
                for moment_of in ("exp_avg", "exp_avg_sq"):
                    optimiser.state[parameter][moment_of][dead] = 0.0

    return again


def lines(path: str | Path) -> Callback:
    """This writes the log as JSON lines beside the checkpoints, one a recorded step and dictionary.

    A run that goes on from a checkpoint writes the lines since that checkpoint once more, the same.
    """
    file = Path(path)

    def write(moment: Training) -> None:
        with file.open("a", encoding="utf-8") as out:
            for name, log in zip(moment.names, moment.logs):
                if log and log[-1]["step"] == moment.step:
                    out.write(json.dumps({"dictionary": name, **log[-1]}) + "\n")

    file.parent.mkdir(parents=True, exist_ok=True)
    return write


def tracker(run: Any) -> Callback:
    """This sends the log to a run of wandb or trackio, both of which you install and start: `tracker(wandb.init())`.

    run: anything with `log(figures, step=)`.
    """

    def send(moment: Training) -> None:
        for name, log in zip(moment.names, moment.logs):
            if log and log[-1]["step"] == moment.step:
                run.log({f"{name}/{figure}": value for figure, value in log[-1].items()}, step=moment.step)

    return send


def alive(dictionary: Dictionary, within: int = 100_000) -> float:
    """This is the share of latents that fired within the last so many examples."""
    return (dictionary.idle <= within).float().mean().item()


__all__ = ["alive", "lines", "resample", "tracker"]
