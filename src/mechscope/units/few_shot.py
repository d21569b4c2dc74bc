"""False induction heads: from demonstrations whose labels are wrong they fetch the wrong label, and promote it.

A few-shot prompt shows inputs of k classes with their labels, then asks for one; in the false one every class bears the
label of the next class, in the right one its own. Both have the same inputs. Each head is measured on both:

    label-attending   attention from the end to the labels shown for the asked class, less a (k - 1)th of that to the
                      other labels, in the false prompts (the prefix-matching score)
                      control: the classes dealt out to the demonstrations at random
    false-induction   what attending to the labels shown adds, at the end, to the false label's logit over the right's
                      control: the same in the right prompts, where nothing false is shown

The first is where a head looks and holds of every head that matches labels; the second is what it does with what it
sees where that is wrong. `misled` is how much of the false label a model follows, with heads ablated or without.
Source: Halawi, Denain and Steinhardt 2023 (arXiv:2307.09476), who ablate the five heads of the highest first score.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mechscope import edits, store
from mechscope.errors import UnitsError
from mechscope.units.kinds import Heads, Kind
from mechscope.units.written import from_keys, gain, prove_keys, to_logits

if TYPE_CHECKING:
    from mechscope.models.model import Model

HALAWI = "Halawi, Denain and Steinhardt 2023, arXiv:2307.09476"
Piece = str | tuple[int, ...]


@dataclass(frozen=True)
class FewShot:
    """This is a few-shot prompt: inputs with their classes, numbered from 0, and the input that is asked about.

    labels: the label of each class, one token. between, after: what stands between an input and its label, and after
    it. Texts, or ids for a model without a tokenizer.

    >>> FewShot((("good", 1), ("bad", 0)), ("fine", 1), (" no", " yes")).text(false=True)
    'good: no\\nbad: yes\\nfine:'
    """

    shown: tuple[tuple[Piece, int], ...]
    asked: tuple[Piece, int]
    labels: tuple[Piece, ...]
    between: Piece = ":"
    after: Piece = "\n"

    def pieces(self, false: bool) -> list[Piece]:
        """This is the prompt in pieces, of which every fourth from the third on is a label."""
        found: list[Piece] = []
        for given, kind in self.shown:
            found += [given, self.between, self.labels[(kind + false) % len(self.labels)], self.after]
        return [*found, self.asked[0], self.between]

    def text(self, false: bool) -> str:
        """This is the prompt as one text; false: with every label exchanged for the next class's."""
        return "".join(map(str, self.pieces(false)))


@dataclass(frozen=True, eq=False)
class Prompts:
    """This is prompts of one length: ids [row pos] false and right, and what stands where.

    places: [row shown], of the labels; same: [row shown], whether of the asked class; answers: [row label], the ids of
    all labels; asked: [row], the class asked for.
    """

    false: Tensor
    right: Tensor
    places: Tensor
    same: Tensor
    answers: Tensor
    asked: Tensor

    def __len__(self) -> int:
        return len(self.asked)

    @property
    def told(self) -> tuple[Tensor, Tensor]:
        """This is, of each row, the class whose label is right and the one whose label the false prompt shows."""
        return self.asked, (self.asked + 1) % self.answers.shape[1]


def false_induction_heads(model: Model, prompts: Sequence[FewShot], seed: int = 0) -> Heads:
    """This is which heads look at labels by their class, and which promote a false label: two kinds.

    Two runs. Raises UnitsError for labels of several tokens, prompts whose false and right forms do not line up, and
    where a gate stands after attention.

    >>> false_induction_heads(model, prompts)["false-induction"].heads  # doctest: +SKIP
    [(2, 0)]
    """
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    parts = [(*_attended(model, group, generator), *_promoted(model, group)) for group in _groups(model, prompts)]
    attended, permuted, promoted, untold = (torch.cat(part, -1) for part in zip(*parts))
    said = f"{attended.shape[-1]} prompts of {len(prompts[0].shown)} demonstrations, {len(prompts[0].labels)} classes"
    kinds = {
        "label-attending": Kind(
            "label-attending",
            "attention to the labels shown for the asked class, less the mean over other classes of that to theirs",
            HALAWI,
            f"{said}, labels false; control: the classes dealt out to the demonstrations at random",
            attended,
            permuted,
            least=0.1,
        ),
        "false-induction": Kind(
            "false-induction",
            "what attending to the labels shown adds to the false label's logit over the right one's",
            HALAWI,
            f"{said}, labels false; control: the same with right labels",
            promoted,
            untold,
            least=0.0,
        ),
    }
    choices = {"false labels": "every class bears the label of the next class", "text": said}
    provenance = {**model.provenance(), "method": "false_induction_heads", "versions": store.manifest()}
    return Heads(kinds, choices, provenance, {"seconds": time.perf_counter() - started, "runs": 2 * len(parts)})


@torch.no_grad()
def misled(
    model: Model, prompts: Sequence[FewShot], without: Iterable[tuple[int, int]] = (), false: bool = True
) -> Tensor:
    """This is the right label's logit over the false label's, prompt by prompt [row], with heads ablated to zero.

    false: with false demonstrations, else with right ones. Prompts are in the order of their lengths.
    """
    ablated = {f"blocks.{layer}.z[head={head}]": edits.zero() for layer, head in without}
    margins = []
    for group in _groups(model, prompts):
        logits = model.run(group.false if false else group.right, edits=ablated).logits
        assert logits is not None
        of_labels = logits[:, -1].float().gather(1, group.answers)
        right, wrong = (of_labels.gather(1, kind[:, None])[:, 0] for kind in group.told)
        margins.append((right - wrong).cpu())
    return torch.cat(margins)


@torch.no_grad()
def _attended(model: Model, group: Prompts, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    sites = model.resolve("blocks.*.pattern")
    out = model.run(group.false, save="blocks.*.pattern", stop_at=sites[-1].site)
    others = group.answers.shape[1] - 1
    order = torch.rand(group.same.shape, generator=generator).argsort(1).to(group.same.device)
    values, controls = [], []
    for site in sites:
        seen = out[site.key][:, :, -1].float()  # [row head key]
        to = seen.gather(2, group.places[:, None].expand(-1, seen.shape[1], -1))
        for into, same in ((values, group.same), (controls, group.same.gather(1, order))):
            weight = torch.where(same, 1.0, -1.0 / others)
            into.append((to * weight[:, None]).sum(-1).T.cpu())
    return torch.stack(values), torch.stack(controls)


@torch.no_grad()
def _promoted(model: Model, group: Prompts) -> tuple[Tensor, Tensor]:
    """This is what labels shown add to the false label over the right one, in false and right prompts, [.. row]."""
    last, found = f"blocks.{model.n_layers - 1}.resid_post", []
    for ids in (group.false, group.right):
        out = model.run(ids, save=["blocks.*.pattern", "blocks.*.v", "blocks.*.head_out", last])
        prove_keys(model, range(model.n_layers), out)
        effect = to_logits(model, out[last][:, -1:], group.answers)
        by_layer = []
        for layer in range(model.n_layers):
            pattern, value = out[f"blocks.{layer}.pattern"][:, :, -1], out[f"blocks.{layer}.v"]
            at = group.places[:, None].expand(-1, pattern.shape[1], -1)
            only = torch.zeros_like(pattern).scatter(2, at, pattern.gather(2, at))
            wrote = from_keys(model, layer, only, value).sum(2, keepdim=True)  # [row head 1 d_model]
            held = gain(model, layer, out[f"blocks.{layer}.head_out"])
            logits = effect(wrote * (held[:, None, -1:] if isinstance(held, Tensor) else held))[:, :, 0]
            right, wrong = (
                logits.gather(-1, kind[:, None, None].expand(-1, logits.shape[1], 1))[..., 0] for kind in group.told
            )
            by_layer.append((wrong - right).T.float().cpu())
        found.append(torch.stack(by_layer))
    return found[0], found[1]


def _groups(model: Model, prompts: Sequence[FewShot]) -> list[Prompts]:
    """This is the prompts as ids, those of one length and one number of demonstrations together."""
    groups: dict[tuple[int, int], list] = {}
    for prompt in prompts:
        false, places = _ids(model, prompt, True)
        right, there = _ids(model, prompt, False)
        if len(false) != len(right) or places != there:
            raise UnitsError(f"the labels {prompt.labels} move what stands after them; take labels of one token each")
        groups.setdefault((len(false), len(places)), []).append((false, right, places, prompt))
    return [_group(model, members) for members in groups.values()]


def _group(model: Model, members: list) -> Prompts:
    false, right, places, prompts = zip(*members)
    same = [[kind == prompt.asked[1] for _, kind in prompt.shown] for prompt in prompts]
    answers = [[_label(model, prompt, kind) for kind in range(len(prompt.labels))] for prompt in prompts]
    asked = [prompt.asked[1] for prompt in prompts]
    made = (torch.tensor(x, device=model.device) for x in (false, right, places, same, answers, asked))
    return Prompts(*made)


def _label(model: Model, prompt: FewShot, kind: int) -> int:
    """This is the id of a class's label where a prompt asks for it."""
    label = prompt.labels[kind]
    if not isinstance(label, str):
        return label[-1]
    return model.ids(f"{prompt.asked[0]}{prompt.between}{label}")[0][-1]


def _ids(model: Model, prompt: FewShot, false: bool) -> tuple[list[int], list[int]]:
    """This is a prompt's ids and the positions of its labels."""
    pieces = prompt.pieces(false)
    if not isinstance(pieces[0], str):
        ids = [token for piece in pieces for token in piece]
        ends = [sum(map(len, pieces[: 4 * shown + 3])) - 1 for shown in range(len(prompt.shown))]
        return ids, [int(end) for end in ends]  # type: ignore[return-value]
    whole = model.ids(prompt.text(false))[0]
    places = []
    for shown in range(len(prompt.shown)):
        before = model.ids("".join(map(str, pieces[: 4 * shown + 2])))[0]
        through = model.ids("".join(map(str, pieces[: 4 * shown + 3])))[0]
        if len(through) != len(before) + 1 or whole[: len(through)] != through:
            raise UnitsError(
                f"the label {pieces[4 * shown + 2]!r} is not one token after {pieces[4 * shown + 1]!r} in "
                f"{model.name}; take labels of one token each, with their leading space"
            )
        places.append(len(through) - 1)
    return whole, places
