"""What heads are worth: pruning curves on trained models, who is over-represented, and a control beside importance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mechscope as ms
from mechscope.errors import UnitsError
from mechscope.tasks import words
from mechscope.units import head_importance, over_represented, pattern_kinds, pruning_curve, repeats
from mechscope.units.ablating import forwards
from mechscope.units.patterns import Repeats

LENGTH = 8


def runs_of_nouns(model: ms.Model, rows: int = 16) -> Repeats:
    """Runs of the nouns that the bundled models know, each run twice: what they were trained to continue."""
    before = len(model.ids("the")[0])
    ids = [model.ids(f"the {singular}")[0] for singular, _ in words.trained(words.NOUNS)]
    nouns = torch.tensor([row[-1] for row in ids if len(row) == before + 1])
    generator = torch.Generator().manual_seed(0)
    piece = torch.stack([nouns[torch.randperm(len(nouns), generator=generator)[:LENGTH]] for _ in range(rows)])
    text = torch.cat([torch.full((rows, 1), model.ids("the")[0][0]), piece, piece], 1)
    first = torch.ones(rows, dtype=torch.long)
    return Repeats(text, first, first + LENGTH, LENGTH, 1)


def announced(text: Repeats) -> Tensor:
    return torch.zeros(text.ids.shape[0], text.ids.shape[1] - 1).scatter_(1, text.later, 1.0).bool()


@pytest.fixture(scope="module")
def measured():
    """Of every shipped model with induction heads: its importance on repeats, and which heads are induction heads."""
    found = {}
    for name in ("induction", "grammar", "grammar-small"):
        model = ms.load(name)
        text = repeats(model, 16, 32) if name == "induction" else runs_of_nouns(model)
        importance = head_importance(model, text.ids, counted=announced(text)).score
        members = torch.zeros(importance.shape, dtype=torch.bool)
        for at in pattern_kinds(model, text=text)["induction"].heads:
            members[at] = True
        found[name] = model, text, importance, members
    return found


def test_most_heads_can_go_when_the_least_important_go_first(measured):
    for name, fewest in (("induction", 6), ("grammar", 10)):
        model, text, importance, _ = measured[name]
        found = pruning_curve(model, text.ids, importance, counted=announced(text), steps=8, orders=3)
        spared = int(found.answer.split()[1])
        at_random = float(found.answer.rsplit(" ", 1)[1])
        assert spared >= fewest and at_random < spared / 2, found.answer
        curves = found.tensors["curves"].mean(-1)  # [order count]
        assert torch.allclose(curves[:, 0], curves[0, 0]) and torch.allclose(curves[:, -1], curves[0, -1], atol=1e-4)


def test_induction_heads_are_over_represented_among_the_important_ones(measured):
    importance = torch.cat([x.flatten() for _, _, x, _ in measured.values()])
    members = torch.cat([x.flatten() for *_, x in measured.values()])
    within = torch.cat([torch.full((x.numel(),), i) for i, (_, _, x, _) in enumerate(measured.values())])
    excess, p = over_represented(importance, members, within=within, ranks=True)
    assert excess > 0.2 and p < 0.05, (excess, p)
    others = torch.zeros_like(members)  # control: as many other heads of each model, the first that are none
    for model in within.unique():
        places = ((within == model) & ~members).nonzero()[:, 0]
        others[places[: int((members & (within == model)).sum())]] = True
    assert over_represented(importance, others, within=within, ranks=True)[1] > 0.05


def test_over_representation_permutes_within_groups_and_by_rank():
    importance, group = torch.tensor([9.0, 1.0, 0.5, 0.0, 9.0, 8.0, 7.0, 6.0]), torch.arange(8) // 4
    members = torch.tensor([False, True, False, False, False, False, False, False])
    # Second of four in its group: one draw of two is as high, whatever the other group's heads are worth.
    assert over_represented(importance, members, within=group)[1] == pytest.approx(0.5, abs=0.02)
    assert over_represented(importance, members, within=group, ranks=True)[0] == pytest.approx(2 / 3 - 0.5)
    both = members | torch.tensor([False] * 4 + [True] + [False] * 3)
    assert over_represented(importance, both, within=group, ranks=True)[1] == pytest.approx(3 / 16, abs=0.02)


def test_importance_has_a_change_as_large_beside_it(measured, tmp_path):
    model, text, _, _ = measured["induction"]
    alone = head_importance(model, text.ids, "zero")
    found = head_importance(model, text.ids, "zero", control=True)
    assert torch.equal(found.values, alone.values) and alone.control is None
    assert found.control is not None and found.control.shape == found.values.shape
    # What the induction head says is what matters, not that its output changes.
    assert float(found.score[1, 0]) > 3 * float(found.control[1, 0].mean().abs())
    assert found.cost["forwards"] == forwards(model, control=True) == 2 * forwards(model) - 1
    again = ms.open(found.save(tmp_path / "importance.safetensors"))
    assert torch.equal(again.control, found.control) and "random" in str(again)


def test_only_the_predictions_that_count_are_counted(measured):
    model, text, importance, _ = measured["induction"]
    assert float(importance[1, 0]) > 1.5 * float(head_importance(model, text.ids).score[1, 0])
    with pytest.raises(UnitsError, match=r"shape \[3\] is not of 2 layers of 4"):
        pruning_curve(model, text.ids, torch.zeros(3))
