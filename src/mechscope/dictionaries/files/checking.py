"""Does a dictionary that was read reconstruct what it is given? If not: which of the usual mistakes would explain it?

A file seldom says all that is needed to use it. Inputs were scaled, or centred by the library that loaded the model, or
b_dec was taken off them, or BOS was left out; the wrong guess gives numbers that look like numbers. `check` measures
the share of variance unexplained on a batch of activations, tries each mistake the other way round, and names the one
that makes the difference.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mechscope.dictionaries.cross_layer import CrossLayerTranscoder
from mechscope.dictionaries.crosscoder import Crosscoder
from mechscope.dictionaries.dictionary import Coder, Dictionary
from mechscope.dictionaries.files.normed import Normed

ROWS = 4096
"""How many vectors a check looks at, at most."""

DOUBTFUL = 0.3
"""The FVU above which other ways of using the dictionary are tried."""

BETTER = 0.7
"""A suspect is named where it leaves less than this share of the variance that was unexplained."""


@dataclass(frozen=True)
class Trial:
    """This is one way of using the dictionary: what is done, what to type for it, and how it reconstructs."""

    what: str
    type_next: str
    fvu: float
    l0: float


@dataclass(frozen=True)
class Check:
    """This is how a dictionary reconstructs a batch, and the other ways of using it that were tried.

    fvu: the share of the variance that is missed; 0 is perfect, 1 is what the mean gives. l0: active latents a vector.
    dead: the share of latents active nowhere in the batch. problems: what is implausible, a sentence each. fix: the
    trial that explains it, if one does.
    """

    fvu: float
    l0: float
    dead: float
    rows: int
    tried: list[Trial] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    fix: Trial | None = None

    @property
    def plausible(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        lines = [f"FVU {self.fvu:.3f}   L0 {self.l0:.1f}   dead {self.dead:.0%} of latents on {self.rows} vectors"]
        lines += [f"  implausible: {what}" for what in self.problems]
        if self.fix is not None:
            lines.append(
                f"  {self.fix.what} gives FVU {self.fix.fvu:.3f} and L0 {self.fix.l0:.1f}: {self.fix.type_next}"
            )
        lines += [f"  tried: {t.what}: FVU {t.fvu:.3f}, L0 {t.l0:.1f}" for t in self.tried if t is not self.fix]
        return "\n".join(lines)


@torch.no_grad()
def check(dictionary: Dictionary, batch: Any, *, warn: bool = True) -> Check:
    """This measures a dictionary on activations and, where it does badly, says what would put it right.

    batch: vectors [..., d_in] of the site that it reads, in the model's own units; (x, target) for a transcoder; or
    tensors by site, z with its heads apart too. A few hundred vectors do; [batch, pos, d_in] lets it try without the
    first position.

    Implausible is an FVU above 1 (worse than the mean), no latent active, most of them active, or an L0 three times
    off the one that the file states. With `warn` each is a warning too.
    """
    x, target = (None if part is None else _heads_beside(part, dictionary) for part in dictionary.parts(batch))
    assert x is not None
    y = x if target is None else target
    joint = isinstance(dictionary, Crosscoder | CrossLayerTranscoder)  # [n, sites, d]: several sites at once
    by_position = not joint and x.ndim == 3 and x.shape[1] > 1
    later = (_rows(x[:, 1:]), _rows(y[:, 1:])) if by_position else None
    x, y = (x[:ROWS], y[:ROWS]) if joint else (_rows(x), _rows(y))
    output, l0, dead = _run(dictionary, x, y)
    fvu = _fvu(output, y)
    problems = _problems(dictionary, fvu, l0)
    tried: list[Trial] = []
    if (problems or fvu > DOUBTFUL) and not joint:
        for what, type_next, out, target, active in _suspects(dictionary, x, y, later):
            tried.append(Trial(what, type_next, _fvu(out, target), active))
    least = min((trial.fvu for trial in tried), default=0.0)
    best = next((trial for trial in tried if trial.fvu <= 1.05 * least + 0.005), None)  # the plainest of the best
    fix = best if best is not None and best.fvu < min(1.0, BETTER * fvu) else None
    if problems and fix is None:
        problems.append(
            "none of the usual mistakes explains it: is it the site, layer and model that the dictionary was made for "
            f"({dictionary.reads or 'it does not say'})?"
        )
    whole = Check(fvu, l0, dead, len(y), sorted(tried, key=lambda t: t.fvu), problems, fix)
    if warn and problems:
        advice = f"; {fix.what} gives FVU {fix.fvu:.3f}: {fix.type_next}" if fix else ""
        warnings.warn(f"{'; '.join(problems)}{advice}", stacklevel=3)
    return whole


def _run(dictionary: Dictionary, x: Tensor, y: Tensor) -> tuple[Tensor, float, float]:
    """This is (output, L0, share of dead latents) on vectors."""
    found = dictionary(x, y)
    fired = found.fired()
    return found.output, found.l0, (fired == 0).float().mean().item()


def _heads_beside(x: Tensor, dictionary: Dictionary) -> Tensor:
    """This is z [batch head pos d_head] as [batch pos head * d_head], which a dictionary of all heads reads."""
    if x.ndim == 4 and x.shape[-1] != dictionary.d_in == x.shape[1] * x.shape[3]:
        return x.transpose(1, 2).flatten(2)
    return x


def _rows(x: Tensor) -> Tensor:
    """This is the first vectors [n, d] of a tensor [..., d]."""
    return x.reshape(-1, x.shape[-1])[:ROWS].float()


def _fvu(output: Tensor, target: Tensor) -> float:
    target = target.to(output)
    return ((output - target).square().sum() / (target - target.mean(0)).square().sum().clamp_min(1e-30)).item()


def _problems(dictionary: Dictionary, fvu: float, l0: float) -> list[str]:
    out = []
    if not fvu < 1:
        out.append(f"FVU is {fvu:.3g}: the mean alone would reconstruct better")
    if l0 < 0.5:
        out.append(f"hardly a latent is active (L0 {l0:.2f})")
    elif l0 > dictionary.n_latents / 4 and l0 > dictionary.d_in:
        out.append(f"L0 is {l0:.0f} of {dictionary.n_latents} latents, more than there are dimensions")
    stated = dictionary.facts.get("l0")
    if isinstance(stated, int | float) and stated > 0 and l0 >= 0.5 and not stated / 3 < l0 < stated * 3:
        out.append(f"L0 is {l0:.1f}, while the file states {stated}")
    return out


def _suspects(
    dictionary: Dictionary, x: Tensor, y: Tensor, later: tuple[Tensor, Tensor] | None
) -> Iterator[tuple[str, str, Tensor, Tensor, float]]:
    """This yields (what is done, what to type, output, target, L0) for each way of using the dictionary otherwise.

    The plainest come first: of those that do equally well, the first is named.
    """
    auto = dictionary.reads == dictionary.writes and dictionary.d_in == dictionary.d_out

    def through(inner: Tensor) -> tuple[Tensor, float]:
        output, l0, _ = _run(dictionary, inner, y)
        return output.float(), l0

    for factor, name in _factors(dictionary, x):
        out, l0 = through(x * factor)
        typed = f"read it with scale={factor:.6g}"
        if auto:
            yield f"multiplying inputs by {factor:.4g} ({name})", typed, out / factor, y, l0
        else:
            yield f"multiplying inputs by {factor:.4g} ({name})", typed, out, y, l0
            least = (out - out.mean(0)).flatten(), (y - y.mean(0)).flatten()
            fitted = (least[0] @ least[1] / least[0].square().sum().clamp_min(1e-30)).item()
            yield (
                f"multiplying inputs by {factor:.4g} ({name}) and outputs by {fitted:.4g}",
                f"{typed}, and then dictionary.scale_out.fill_({1 / fitted if fitted else 1:.6g})",
                (out - out.mean(0)) * fitted + y.mean(0), y, l0,
            )  # fmt: skip
    mean = x.mean(-1, keepdim=True)
    out, l0 = through(x - mean)
    centred = y - y.mean(-1, keepdim=True) if auto else y
    what = "taking each vector's own mean off it (TransformerLens centres what is written to the stream)"
    yield what, "give it x - x.mean(-1, keepdim=True)", out, centred, l0
    if isinstance(dictionary, Coder):
        yield from _of_coder(dictionary, x, y, through)
    norms = x.norm(dim=-1)
    usual = norms < 10 * norms.median()
    if not usual.all():
        out, l0, _ = _run(dictionary, x[usual], y[usual])
        what = f"leaving out {int((~usual).sum())} vectors of more than 10 times the median norm (BOS and the like)"
        yield what, "leave them out: it was not trained on them", out, y[usual], l0
    elif later is not None:
        out, l0, _ = _run(dictionary, *later)
        yield "leaving out the first position (BOS)", "leave it out: it was not trained on it", out, later[1], l0
    if auto and not isinstance(dictionary, Normed):
        yield from _by_itself(x, y, through)


def _factors(dictionary: Dictionary, x: Tensor) -> Iterator[tuple[float, str]]:
    norm, rms = x.norm(dim=-1).mean().item(), x.square().sum(-1).mean().sqrt().item()
    yield dictionary.d_in**0.5 / max(norm, 1e-30), "to a mean norm of sqrt(d)"
    yield 1 / max(rms, 1e-30), "to a mean squared norm of 1"
    own = getattr(dictionary, "scale_in", None)
    if own is not None and own.numel() == 1 and float(own) != 1:
        yield 1 / float(own), "undoing the dictionary's own scale"


def _by_itself(x: Tensor, y: Tensor, through: Any) -> Iterator[tuple[str, str, Tensor, Tensor, float]]:
    for how in ("constant_norm_rescale", "layer_norm"):
        if how == "layer_norm":
            shift, factor = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        else:
            shift, factor = torch.zeros_like(x[:, :1]), x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        out, l0 = through((x - shift) / factor.clamp_min(1e-30))
        yield (
            f"normalising each vector by itself ({how})",
            f"mechscope.dictionaries.Normed(dictionary, {how!r})", out * factor + shift, y, l0,
        )  # fmt: skip


def _of_coder(coder: Coder, x: Tensor, y: Tensor, through: Any) -> Iterator[tuple[str, str, Tensor, Tensor, float]]:
    middle = coder.b_dec / coder.scale_in
    if coder.d_in == coder.d_out and middle.any():
        if coder.centred:
            out, l0 = through(x + middle)
            yield "leaving b_dec on the input", "set dictionary.centred = False", out, y, l0
        else:
            out, l0 = through(x - middle)
            yield "taking b_dec off the input", "set dictionary.centred = True", out, y, l0
    norms = coder.W_dec.norm(dim=1)
    if (norms - 1).abs().max() > 0.01:
        features = coder.encode(x)
        l0 = (features != 0).float().sum(-1).mean().item()
        safe = norms.clamp_min(1e-8)
        for what, changed in (("dividing", features / safe), ("multiplying", features * safe)):
            out = coder.decode(changed, x)
            times = "twice" if what == "dividing" else "not yet"
            typed = f"scale W_dec's rows: the decoder's norm is in the features {times}"
            yield f"{what} the features by the decoder's norms", typed, out, y, l0
    if coder.W_skip is not None and coder.d_in == coder.d_out:
        skipped = x * coder.scale_in
        out, l0 = through(x)
        out = out + (skipped @ coder.W_skip - skipped @ coder.W_skip.T) / coder.scale_out
        yield "turning the skip connection's matrix round", "dictionary.W_skip.data = dictionary.W_skip.T", out, y, l0
