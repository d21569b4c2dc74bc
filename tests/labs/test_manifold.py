"""The generator of places on circles and spheres: unit points, subspaces of their own, the same batch for a step."""

from __future__ import annotations

import pytest
import torch

from mechscope.errors import LabError
from mechscope.labs.sparse import Manifold


@pytest.mark.parametrize("kind, m", [("circle", 2), ("sphere", 3)])
def test_x_is_the_points_in_their_subspaces(kind, m):
    data = Manifold(d=16, kind=kind, n=3, active=0.6, low=0.5, high=2.0)
    x, points = data.batch(3, 4000)
    assert torch.equal(x, data.batch(3, 4000).x) and not torch.equal(x, data.batch(4, 4000).x)
    there = points.norm(dim=2) > 0
    assert torch.allclose(points.norm(dim=2)[there], torch.ones(int(there.sum())), atol=1e-5)
    assert there.double().mean() == pytest.approx(0.6, abs=0.03)
    basis = data.subspaces.flatten(0, 1)
    assert torch.allclose(basis @ basis.T, torch.eye(3 * m), atol=1e-5)
    inside = torch.einsum("bd,nmd->bnm", x, data.subspaces)
    radius = inside.norm(dim=2)
    assert torch.allclose(inside, radius[..., None] * points, atol=1e-4)
    assert 0.5 <= radius[there].min() < 0.6 and 1.9 < radius[there].max() <= 2.0 + 1e-4
    assert points.sum((0, 1)).norm() / there.sum() < 0.05  # all around


def test_batches_and_streams_go_on_and_what_has_no_room_is_refused():
    data = Manifold(d=8)
    assert torch.equal(next(data.batches(10, start=2)).x, data.batch(2, 10).x)
    assert next(data.stream(10)).shape == (10, 8)
    with pytest.raises(LabError, match="n <= 4"):
        Manifold(d=8, n=5)
    with pytest.raises(LabError, match="circle, sphere"):
        Manifold(kind="torus")  # type: ignore[arg-type]
