"""Erasing a concept by a few latents: whether a biased classifier forgets what it should, and others lose nothing.

    SCR   a probe is trained where the target and a spurious concept always go together; the latents of the spurious one
          are ablated; (A_ablated - A_biased) / (A_unbiased - A_biased), accuracies on rows where they do not
    TPP   mean over concepts i of the accuracy that probe i loses when the latents of i are ablated, less the mean over
          i != j of what probe j loses

Latents are chosen by (how much higher their mean is with the concept) x (what they write along the concept's probe),
and ablated with the reconstruction's error kept. A perfect dictionary's SCR is 1 and its TPP 1/2, for as many latents
as the concept has, when latents are ablated to their mean. The papers ablate to zero, which moves what the probe
compares with its offset: a perfect dictionary then scores less, and how much less depends on the offset.

Source: Karvonen et al. 2024, "Evaluating sparse autoencoders on targeted concept erasure tasks" (arXiv:2411.18895);
SAEBench (arXiv:2503.09532). Beware: Chanin 2026 (arXiv:2605.18229) found that neither ranks dictionaries reliably when
many latents are ablated; hence the control, and no default above 10.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mechscope.dictionaries.dictionary import Dictionary
from mechscope.dictionaries.evaluating.probes import Probe, balanced, fit
from mechscope.dictionaries.evaluating.report import DictionaryReport, Measure, described
from mechscope.dictionaries.evaluating.rows import Labels, directions, features, halves, named, usable
from mechscope.dictionaries.evaluating.tally import Tally, mean
from mechscope.errors import DictionaryError

ABLATED = (1, 2, 5, 10)


def spurious_correlation_removal(
    dictionary: Dictionary,
    x: Tensor,
    target: Tensor,
    spurious: Tensor,
    ablated: Sequence[int] = ABLATED,
    to: Literal["mean", "zero"] = "mean",
    seed: int = 0,
) -> DictionaryReport:
    """This measures how much of a probe's bias the ablation of a spurious concept's latents undoes (SCR).

    x: [n, d]. target, spurious: [n] bool, all four combinations of which must be there. ablated: how many latents. to:
    their mean over the rows to choose on, or zero as published. The control ablates as many random latents that fire.
    Intervals are over the rows that are judged. The tensors hold `latents`, in the order in which they are ablated.

    Raises DictionaryError where a combination is missing, or the probe is not biased, so that nothing can be undone.
    """
    x, on, off = x.detach(), target.bool().to(x.device), spurious.bool().to(x.device)
    choosing, judging = halves(len(x), seed)
    rows, others = (_four(on, off, part, seed) for part in (choosing, judging))
    together = balanced(on, choosing[(on == off)[choosing].cpu()], seed)
    biased, unbiased, confound = fit(x[together], on[together]), fit(x[rows], on[rows]), fit(x[rows], off[rows])
    active, writers = features(dictionary, x), directions(dictionary)
    order = _effects(active[rows], off[rows], writers, confound).abs().topk(min(max(ablated), len(writers))).indices
    alive = (active != 0).any(0).nonzero().flatten()
    change = _change(active, rows, to)
    generator = torch.Generator().manual_seed(seed)

    def hits(probe: Probe, latents: Tensor | None = None) -> Tensor:
        vectors = x[others] if latents is None else x[others] + change[others][:, latents] @ writers[latents]
        return (probe(vectors) == on[others]).double()

    columns, names = [hits(biased), hits(unbiased)], []
    for size in ablated:
        drawn = alive[torch.randperm(len(alive), generator=generator)[:size].to(alive.device)]
        names += [(size, False), (size, True)]
        columns += [hits(biased, order[:size]), hits(biased, drawn)]
    tally = Tally(block=1)
    tally.add(torch.stack(columns, 1))
    before, best = float(columns[0].mean()), float(columns[1].mean())
    if best <= before:
        raise DictionaryError(
            f"the probe trained where both concepts go together is right on {before:.1%} of the other rows, and one "
            f"trained on all on {best:.1%}: there is no bias to undo. Choose concepts that x tells both of"
        )
    measures = [
        Measure(
            f"SCR, {size} latents" + ", random" * control,
            *tally.interval(
                lambda total, i=2 + i: (total[..., i] - total[..., 0]) / (total[..., 1] - total[..., 0]), seed
            ),
            ideal=None if control else 1.0,
            control=control,
        )
        for i, (size, control) in enumerate(names)
    ]
    measures += [
        Measure("accuracy, biased", *mean(columns[0]), about="of the probe where the concepts do not go together"),
        Measure("accuracy, unbiased", *mean(columns[1]), about="of a probe trained where they do not"),
    ]
    shown = ", ".join(
        f"{m.value:.2f} from {m.name.split()[1]}" for m in measures if m.name.startswith("SCR") and not m.control
    )
    return DictionaryReport(
        question=f"spurious correlation removal with {type(dictionary).__name__} of {dictionary.n_latents:,} latents",
        verdict=f"SCR {shown} latents",
        measures=tuple(measures),
        choices={
            "chosen": "mean difference x what is written along the spurious concept's probe",
            "ablated": f"to {'their mean' if to == 'mean' else 'zero'}, the error kept",
            "judged": f"{len(others):,} other rows, a quarter of each combination",
        },
        tensors={"latents": order.cpu()},
        provenance=described(dictionary),
    )


def targeted_probe_perturbation(
    dictionary: Dictionary,
    x: Tensor,
    labels: Labels,
    ablated: Sequence[int] = ABLATED,
    to: Literal["mean", "zero"] = "mean",
    seed: int = 0,
) -> DictionaryReport:
    """This measures whether ablating a concept's latents hurts its own probe and no other (TPP).

    x: [n, d]. labels: {name: [n] bool}, or [n, concepts], of two or more. ablated: how many latents. to: their mean
    over the rows to choose on, or zero as published. The control ablates as many random latents that fire. Intervals
    are over concepts. The tensors hold `drops.N` [ablated concept, probe], the accuracy that each probe loses with N
    latents, and `latents.NAME`.

    Raises DictionaryError with fewer than two concepts that are both present and absent.
    """
    x = x.detach()
    choosing, judging = halves(len(x), seed)
    concepts = usable(named(labels, len(x)), (choosing, judging))
    if len(concepts) < 2:
        raise DictionaryError(
            f"the perturbation of {next(iter(concepts))!r} is held against other probes'; give two concepts"
        )
    active, writers = features(dictionary, x), directions(dictionary)
    alive = (active != 0).any(0).nonzero().flatten()
    change = _change(active, choosing, to)
    generator = torch.Generator().manual_seed(seed)
    probes, others, orders = {}, {}, {}
    for name, held in concepts.items():
        concepts[name] = on = held.to(x.device)
        rows, others[name] = balanced(on, choosing, seed), balanced(on, judging, seed)
        probes[name] = fit(x[rows], on[rows])
        effects = _effects(active[rows], on[rows], writers, probes[name])
        orders[name] = effects.topk(min(max(ablated), len(effects))).indices

    def drops(chosen: dict[str, Tensor]) -> Tensor:
        """The accuracy that each probe loses under each concept's ablation, [ablated concept, probe]."""
        table = torch.zeros(len(concepts), len(concepts))
        for j, name in enumerate(concepts):
            rows, on = others[name], concepts[name][others[name]]
            before = probes[name].accuracy(x[rows], on)
            for i, latents in enumerate(chosen.values()):
                vectors = x[rows] + change[rows][:, latents] @ writers[latents]
                table[i, j] = before - probes[name].accuracy(vectors, on)
        return table

    measures, tensors = [], {f"latents.{name}": order.cpu() for name, order in orders.items()}
    own = torch.eye(len(concepts), dtype=torch.bool)
    for size in ablated:
        drawn = {n: alive[torch.randperm(len(alive), generator=generator)[:size].to(alive.device)] for n in concepts}
        for control, chosen in ((False, {n: order[:size] for n, order in orders.items()}), (True, drawn)):
            table = drops(chosen)
            intended, side = table[own], table.masked_fill(own, 0).sum(1) / (len(concepts) - 1)
            suffix = f"{size} latents" + ", random" * control
            measures.append(
                Measure(f"TPP, {suffix}", *mean(intended - side), ideal=None if control else 0.5, control=control)
            )
            if not control:
                tensors[f"drops.{size}"] = table
                measures += [
                    Measure(f"own probe, {suffix}", *mean(intended), ideal=0.5, about="accuracy lost"),
                    Measure(f"other probes, {suffix}", *mean(side), ideal=0.0, about="accuracy lost"),
                ]
                measures += [
                    Measure(f"TPP, {size}", float(a - b), of=name) for name, a, b in zip(concepts, intended, side)
                ]
    shown = ", ".join(
        f"{m.value:.2f} from {m.name.split()[1]}"
        for m in measures
        if m.name.endswith("latents") and m.name[:3] == "TPP"
    )
    return DictionaryReport(
        question=f"targeted perturbation of {len(concepts)} probes with {type(dictionary).__name__}",
        verdict=f"TPP {shown} latents (at most 0.5)",
        measures=tuple(measures),
        choices={
            "chosen": "mean difference x what is written along the concept's probe",
            "ablated": f"to {'their mean' if to == 'mean' else 'zero'}, the error kept",
            "judged": "accuracy on other rows, balanced for each probe",
        },
        tensors=tensors,
        provenance=described(dictionary),
    )


def _change(active: Tensor, rows: Tensor, to: str) -> Tensor:
    """This is what ablation adds to each feature [n, n_latents]."""
    return (active[rows].mean(0) if to == "mean" else 0.0) - active


def _effects(active: Tensor, on: Tensor, writers: Tensor, probe: Probe) -> Tensor:
    """This is what each latent adds to a probe's logit where its concept is, over where it is not [n_latents]."""
    return (active[on].mean(0) - active[~on].mean(0)) * (writers @ probe.weight.to(writers))


def _four(on: Tensor, off: Tensor, rows: Tensor, seed: int) -> Tensor:
    """This is as many of `rows` of each of the four combinations. Raises DictionaryError where one is missing."""
    generator = torch.Generator().manual_seed(seed)
    cells = [rows[((on == a) & (off == b))[rows].cpu()] for a in (False, True) for b in (False, True)]
    least = min(map(len, cells))
    if not least:
        raise DictionaryError(
            "the target and the spurious concept are not there in all four combinations, on the rows to choose on and "
            "on those to judge on; give more rows"
        )
    return torch.cat([cell[torch.randperm(len(cell), generator=generator)[:least]] for cell in cells])
