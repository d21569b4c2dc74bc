"""`TokenMask`: which tokens count, by id, position and norm; the same after a round trip, and in a stream."""

from __future__ import annotations

import json

import pytest
import torch

import mechscope as ms
from mechscope.models.token_mask import TokenMask

IDS = torch.tensor([[1, 5, 6, 2], [0, 1, 7, 8]])
REAL = torch.tensor([[True, True, True, True], [False, True, True, True]])


def test_special_tokens_listed_ids_and_first_positions_are_out(words):
    mask = TokenMask(ids=(6,)).of(words)
    assert mask.special_ids == (0, 1, 2)
    assert mask(IDS, REAL).tolist() == [[False, True, False, False], [False, False, True, True]]
    first = TokenMask(special=False, first=2)
    assert first(IDS, REAL).tolist() == [[False, False, True, True], [False, False, False, True]]
    assert TokenMask(special=False)(IDS).all()


def test_outliers_are_out_by_the_median_of_the_first_batch():
    values = torch.ones(2, 4, 3)
    values[0, 0], values[1, 3] = 1000, 30
    mask = TokenMask(special=False, first=1, outliers=10)
    fitted = mask.fitted(IDS, None, {"a": values})
    assert fitted.medians == {"a": pytest.approx(3**0.5)}, "of the tokens that count otherwise"
    assert fitted(IDS, None, {"a": values}).tolist() == [[False, True, True, True], [False, True, True, False]]
    assert fitted.fitted(IDS, None, {"a": 100 * values}) is fitted, "and then it is fixed"
    assert not fitted(IDS, None, {"a": 100 * values}).any()
    both = fitted.fitted(IDS, None, {"a": values, "b": values.flip(1)})
    assert both(IDS, None, {"a": values, "b": values.flip(1)}).sum() == 4, "an outlier at one site is out at all"


def test_json_gives_the_mask_back():
    mask = TokenMask(ids=(9, 3), first=1, outliers=8.0, special_ids=(2, 1), medians={"a": 1.5})
    assert TokenMask.from_json(json.loads(json.dumps(mask.to_json()))) == mask
    assert TokenMask.from_json(TokenMask().to_json()) == TokenMask()
    assert str(mask) == "all tokens but special tokens; the ids 3, 9; the first 1 of a row; norms above 8 medians"
    assert str(TokenMask(special=False)) == "all tokens"


def test_a_stream_fits_its_mask_once_and_carries_it(words):
    ids = torch.randint(3, 20, (6, 9), generator=torch.Generator().manual_seed(0))
    at = "blocks.1.resid_post"
    stream = words.stream(ids, at, batch=2, mask=TokenMask(first=1, outliers=1.1))
    assert stream.mask.medians == {}
    given = [next(stream)]
    medians = stream.mask.medians
    given += list(stream)
    assert stream.mask.medians == medians and list(medians) == [at]
    values = words.run(ids, save=at)[at]
    median = values[:2, 1:].norm(dim=-1).median().item()
    assert medians[at] == pytest.approx(median, rel=1e-5)
    kept = values[:, 1:][values[:, 1:].norm(dim=-1) <= 1.1 * medians[at]]
    assert torch.allclose(torch.cat(given), kept, atol=1e-5) and 0 < len(kept) < 48
    again = torch.cat(list(words.stream(ids, at, batch=3, mask=stream.mask)))
    assert torch.allclose(again, kept, atol=1e-5), "the mask as used takes the same tokens elsewhere"


def test_what_a_mask_cannot_do_is_named(words):
    for make, says in (
        (lambda: TokenMask(outliers=1), "above 1"),
        (lambda: TokenMask(first=-1), "0 or more"),
        (lambda: TokenMask(outliers=3)(IDS), "pass values"),
        (lambda: TokenMask(outliers=3, medians={"a": 1.0})(IDS, None, {"b": torch.ones(2, 4, 1)}), "no median norm"),
        (lambda: TokenMask.from_json({"outlier": 3}), "did you mean 'outliers'"),
        (lambda: TokenMask(special_ids=(50256,)).of(words), "another"),
    ):
        with pytest.raises(ms.errors.TokenError, match=says):
            make()
