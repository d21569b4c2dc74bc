"""What the model loses when a dictionary's reconstruction takes a site's place, and whether its errors are like noise.

    loss recovered     (L_ablated - L_spliced) / (L_ablated - L_clean), L the loss of the next token, the site being
                       ablated to zero or to its mean
    KL of the splice   KL(clean || spliced) of next-token distributions
    KL ratio           that, over the same with x + e u in place of x_hat: u random in every direction, e = |x - x_hat|
                       of each token. 1 where the errors are as harmless as noise of their size
    KL ratio, norms kept   the same with x_hat brought to the norm of x, over random vectors of that norm and of the
                       same cosine with x: so that shrinkage is no excuse

Sources: loss recovered, Bricken et al. 2023 (Towards Monosemanticity) and SAEBench (Karvonen et al. 2025,
arXiv:2503.09532); the ratio, Gurnee 2024, "SAE reconstruction errors are (empirically) pathological", who found 2 to
4.5. A dictionary without errors has no such ratio; it is given as 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechscope.dictionaries.dictionary import Dictionary
from mechscope.dictionaries.evaluating.report import DictionaryReport, Measure, described
from mechscope.dictionaries.evaluating.rows import coded
from mechscope.dictionaries.evaluating.tally import Tally
from mechscope.edits import unchanged
from mechscope.errors import DictionaryError
from mechscope.models.contexts import contexts
from mechscope.models.token_mask import TokenMask

if TYPE_CHECKING:
    from mechscope.models.model import Model

EXACT = 1e-5
"""An error below this share of the vector's norm is rounding."""


def loss_recovered(
    model: Model,
    texts: Iterable[str] | Tensor,
    dictionary: Dictionary,
    *,
    at: str | tuple[str, str] | None = None,
    context: int = 128,
    limit: int | None = None,
    rows: int = 16,
    draws: int = 1,
    mask: TokenMask | None = None,
    seed: int = 0,
) -> DictionaryReport:
    """This runs the model with a site replaced by its reconstruction, by zero, by its mean, and by noise as large.

    texts: texts, or ids [rows, context]. at: the site, or (reads, writes); the dictionary's own unless given. context:
    tokens in a row; limit: rows at most. rows: how many run together. draws: of noise for each row. mask: which tokens
    are replaced; unless given those that the dictionary says it was trained on, or all but special ones. A transcoder's
    reconstruction takes the place of what it writes.

    Intervals are over rows. Raises DictionaryError for a dictionary without a site, or of several.

    >>> loss_recovered(model, texts, sae)["loss recovered, mean"].value  # doctest: +SKIP
    0.97
    """
    reads, writes = _sites(dictionary, at)
    held = list(islice(contexts(model, texts, context), limit))
    if not any(len(row) > 1 for row in held):
        raise DictionaryError("no text is longer than one token, so that no next token can be predicted; give more")
    tally, random = Tally(block=1), torch.Generator().manual_seed(seed)
    mask = _mask(model, dictionary, mask).of(model)
    mask, mean = _mean(model, held, writes, rows, mask)
    for batch in _batches(held, rows):
        tally.add(_measured(model, batch, dictionary, reads, writes, mean, draws, mask, random))
    return _report(model, dictionary, tally, reads, writes, context, draws, mask, seed)


# One batch


@dataclass(frozen=True)
class _Site:
    """This is what a batch has at a site, as vectors [rows pos d] and as it is, and which of them are replaced."""

    vectors: Tensor
    kept: Tensor
    values: Tensor

    def put(self, vectors: Tensor) -> Any:
        """This is an edit that puts vectors [rows pos d] at the tokens that are replaced."""
        placed = torch.where(self.kept[..., None], vectors, self.vectors)
        if self.values.ndim == 4:  # [rows head pos d]
            placed = placed.unflatten(-1, (self.values.shape[1], -1)).transpose(1, 2)
        return unchanged(lambda _: placed.to(self.values))


def _flat(values: Tensor) -> Tensor:
    """This is a site's values as [rows pos d], heads side by side."""
    return values.transpose(1, 2).flatten(2) if values.ndim == 4 else values


@torch.no_grad()
def _measured(
    model: Model,
    batch: list[list[int]],
    dictionary: Dictionary,
    reads: str,
    writes: str,
    mean: Tensor,
    draws: int,
    mask: TokenMask,
    random: torch.Generator,
) -> Tensor:
    """This is what a batch adds for each of its rows, [rows, quantities], in the order of `_NAMES`."""
    ids = torch.tensor(batch)
    clean = model.run(ids, save=[reads, writes] if reads != writes else reads)
    x, y = _flat(clean[reads]), _flat(clean[writes]).float()
    site = _Site(y, mask(ids, values={writes: y}).to(y.device), clean[writes])
    output = coded(dictionary, x.reshape(-1, x.shape[-1]))[1].view_as(y).to(y)
    error = (output - y).norm(dim=-1, keepdim=True)
    restored = output * (y.norm(dim=-1, keepdim=True) / output.norm(dim=-1, keepdim=True).clamp_min(1e-12))

    tokens = site.kept[:, :-1].float()
    before = clean.logits.float().log_softmax(-1)
    losses, divergences = [_loss(before, ids, tokens)], []
    for vectors in (output, torch.zeros_like(y), mean.to(y).expand_as(y)):
        after = model.run(ids, edits={writes: site.put(vectors)}).logits.float().log_softmax(-1)
        losses.append(_loss(after, ids, tokens))
        divergences.append(_divergence(before, after, site.kept))

    def of(vectors: Tensor) -> Tensor:
        after = model.run(ids, edits={writes: site.put(vectors)}).logits.float().log_softmax(-1)
        return _divergence(before, after, site.kept)

    noise = [_unit(y, random) for _ in range(draws)]
    divergences.append(sum((of(y + error * u) for u in noise), torch.zeros(len(ids))) / draws)
    divergences.append(of(restored))
    divergences.append(sum((of(_turned(y, restored, u)) for u in noise), torch.zeros(len(ids))) / draws)
    kept = site.kept.float()
    sizes = [(kept * error[..., 0].square()).sum(1), (kept * y.square().sum(-1)).sum(1)]
    counts = [tokens.sum(1), kept.sum(1)]
    return torch.stack([sums.cpu() for sums in (*counts, *losses, *divergences, *sizes)], 1)


_NAMES = (
    "predicted", "replaced",
    "loss clean", "loss spliced", "loss zero", "loss mean",
    "KL spliced", "KL zero", "KL mean", "KL random", "KL restored", "KL turned",
    "error", "size",
)  # fmt: skip
"""The sums over tokens that a row adds."""


def _loss(logs: Tensor, ids: Tensor, tokens: Tensor) -> Tensor:
    """This is the summed loss of the next token in each row [rows], where `tokens` [rows pos-1] is 1."""
    found = -logs[:, :-1].gather(-1, ids[:, 1:, None].to(logs.device))[..., 0]
    return (found * tokens).sum(1).cpu()


def _divergence(before: Tensor, after: Tensor, kept: Tensor) -> Tensor:
    """This is the summed KL(before || after) in each row [rows], over tokens that are replaced."""
    return torch.stack([((p.exp() * (p - q)).sum(-1) * k).sum() for p, q, k in zip(before, after, kept)]).cpu()


def _unit(like: Tensor, random: torch.Generator) -> Tensor:
    drawn = torch.randn(like.shape, generator=random).to(like)
    return drawn / drawn.norm(dim=-1, keepdim=True)


def _turned(y: Tensor, restored: Tensor, noise: Tensor) -> Tensor:
    """This is vectors of the norm of y, as far turned from it as `restored` is, but each in a random direction."""
    size = y.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    along = y / size
    across = noise - (noise * along).sum(-1, keepdim=True) * along
    across = across / across.norm(dim=-1, keepdim=True)
    cosine = ((restored * along).sum(-1, keepdim=True) / size).clamp(-1, 1)
    return size * (cosine * along + (1 - cosine.square()).sqrt() * across)


# All of them


def _sites(dictionary: Dictionary, at: str | tuple[str, str] | None) -> tuple[str, str]:
    given = (dictionary.reads, dictionary.writes) if at is None else (at, at) if isinstance(at, str) else at
    reads, writes = given
    if not isinstance(reads, str) or not isinstance(writes, str):
        why = "does not say which site it is of" if reads is None else f"is of several sites, {reads} -> {writes}"
        raise DictionaryError(f"this {type(dictionary).__name__} {why}; give one: at='blocks.3.resid_post'")
    return reads, writes


def _batches(held: list[list[int]], rows: int) -> Iterator[list[list[int]]]:
    """This is rows of one length together; a context of one token predicts nothing and is left out."""
    for length, alike in groupby(sorted(held, key=len, reverse=True), key=len):
        same = list(alike)
        if length > 1:
            yield from (same[start : start + rows] for start in range(0, len(same), rows))


def _mask(model: Model, dictionary: Dictionary, mask: TokenMask | None) -> TokenMask:
    held = dictionary.facts.get("mask")
    return mask or (TokenMask.from_json(held) if isinstance(held, dict) else TokenMask())


@torch.no_grad()
def _mean(model: Model, held: list[list[int]], site: str, rows: int, mask: TokenMask) -> tuple[TokenMask, Tensor]:
    """This is the mask with the median norm of a first batch, if it needs one, and the mean of what it keeps [d]."""
    total, count = torch.zeros(()), 0
    for batch in _batches(held, rows):
        ids = torch.tensor(batch)
        values = _flat(model.run(ids, save=site, stop_at=site)[site])
        mask = mask.fitted(ids, None, {site: values})
        kept = values[mask(ids, values={site: values}).to(values.device)].double()
        total, count = total.to(kept) + kept.sum(0), count + len(kept)
    return mask, (total / max(1, count)).float()


def _report(
    model: Model,
    dictionary: Dictionary,
    tally: Tally,
    reads: str,
    writes: str,
    context: int,
    draws: int,
    mask: TokenMask,
    seed: int,
) -> DictionaryReport:
    def per(total: Tensor, name: str) -> Tensor:
        return total[..., _NAMES.index(name)]

    def loss(name: str) -> Callable[[Tensor], Tensor]:
        return lambda total: per(total, f"loss {name}") / per(total, "predicted")

    def recovered(name: str) -> Callable[[Tensor], Tensor]:
        def share(total: Tensor) -> Tensor:
            ablated = per(total, f"loss {name}")
            return (ablated - per(total, "loss spliced")) / (ablated - per(total, "loss clean"))

        return share

    def divergence(name: str) -> Callable[[Tensor], Tensor]:
        return lambda total: per(total, f"KL {name}") / per(total, "replaced")

    def ratio(one: str, other: str) -> Callable[[Tensor], Tensor]:
        return lambda total: per(total, f"KL {one}") / per(total, f"KL {other}")

    def measure(name: str, of: Callable[[Tensor], Tensor], unit: str, ideal: float | None = None, about: str = ""):
        return Measure(name, *tally.interval(of, seed), unit=unit, ideal=ideal, about=about)

    error = tally.interval(lambda total: (per(total, "error") / per(total, "size")).sqrt(), seed)
    ratios = [("KL ratio", "spliced", "random"), ("KL ratio, norms kept", "restored", "turned")]
    exact = error[0] < EXACT
    measures = (
        measure("loss recovered, zero", recovered("zero"), "share", 1.0, "of what ablating the site to zero costs"),
        measure("loss recovered, mean", recovered("mean"), "share", 1.0, "of what ablating it to its mean costs"),
        *(measure(f"loss, {name}", loss(name), "nats") for name in ("clean", "spliced", "zero", "mean")),
        measure("KL of the splice", divergence("spliced"), "nats", 0.0),
        measure("KL of noise", divergence("random"), "nats", about="of errors as large, in random directions"),
        measure("KL of the mean", divergence("mean"), "nats", about="the site ablated to its mean"),
        *(
            Measure(name, 1.0, ideal=1.0, about="there are no errors beyond rounding")
            if exact
            else measure(name, ratio(*pair), "", 1.0, "above 1: errors do more than noise of their size")
            for name, *pair in ratios
        ),
        Measure("error", *error, unit="share of the norm", ideal=0.0, about="root mean square"),
    )
    by_name = {one.name: one for one in measures}
    at = writes if reads == writes else f"{reads} -> {writes}"
    return DictionaryReport(
        question=f"{type(dictionary).__name__} of {dictionary.n_latents:,} latents at {at} in {model.name}",
        verdict=(
            f"{by_name['loss recovered, zero'].value:.1%} of the loss recovered over zero, "
            f"{by_name['loss recovered, mean'].value:.1%} over the mean; its errors do "
            f"{by_name['KL ratio'].value:.2g} times what noise does"
        ),
        measures=measures,
        choices={
            "rows": f"{len(tally.sums)} of at most {context} tokens, all run once for each replacement",
            "replaced": str(mask),
            "noise": f"{draws} draw(s) for each token, isotropic",
            "intervals": "bootstrap over rows",
        },
        tensors={"sums": tally.sums},
        provenance={**described(dictionary), **model.provenance(), "quantities": list(_NAMES)},
    )
