"""Linear probes, as the metrics of this room need them: logistic regressions on vectors or on a few features.

balanced(on, rows)        as many rows with a concept as without
fit(x, on)                a probe: a direction and an offset, by scikit-learn
k_sparse(active, on, k)   the k features whose means differ most, which a k-sparse probe reads
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mechscope.errors import DictionaryError


@dataclass(frozen=True)
class Probe:
    """This is a linear probe: a concept is present where x . weight + offset > 0. weight: [d]."""

    weight: Tensor
    offset: float

    @property
    def direction(self) -> Tensor:
        """This is its weight with norm 1 [d]."""
        return self.weight / self.weight.norm().clamp_min(1e-12)

    def __call__(self, x: Tensor) -> Tensor:
        """This is what it says of x [n, d]: [n] bool."""
        return x @ self.weight.to(x) + self.offset > 0

    def accuracy(self, x: Tensor, on: Tensor) -> float:
        return float((self(x) == on).double().mean())


def balanced(on: Tensor, rows: Tensor, seed: int = 0) -> Tensor:
    """This is as many of `rows` with a concept as without, drawn at random and in their order.

    >>> balanced(torch.tensor([True, False, False, False]), torch.arange(4)).shape
    torch.Size([2])
    """
    generator = torch.Generator().manual_seed(seed)
    held = on[rows].cpu()
    kinds = [rows[kind] for kind in (held, ~held)]
    least = min(map(len, kinds))
    drawn = [kind[torch.randperm(len(kind), generator=generator)[:least]] for kind in kinds]
    return torch.cat(drawn).sort().values


def fit(x: Tensor, on: Tensor, strength: float = 1.0) -> Probe:
    """This is the logistic regression of `on` [n] on x [n, d], with an L2 penalty of 1 / strength.

    x is divided by its root mean square, so that the penalty means the same at every site. Raises DictionaryError
    without scikit-learn, and where all rows are of one kind.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as missing:
        raise DictionaryError("probes need scikit-learn: pip install 'mechscope[probe]'") from missing
    if bool(on.all()) or not bool(on.any()):
        raise DictionaryError(f"a probe needs rows with the concept and without: all {len(on)} are of one kind")
    size = float(x.double().square().mean().sqrt()) or 1.0
    made = LogisticRegression(C=strength, max_iter=1000).fit(
        (x / size).detach().cpu().double().numpy(), on.cpu().numpy()
    )
    weight = torch.from_numpy(made.coef_[0] / size).float()
    return Probe(weight.to(x.device), float(made.intercept_[0]))


def k_sparse(active: Tensor, on: Tensor, k: int) -> Tensor:
    """This is the k features [n, m] whose means differ most between rows with a concept and without.

    The first of them differs most. This is how SAEBench chooses them.
    """
    gap = (active[on].mean(0) - active[~on].mean(0)).abs()
    return gap.topk(min(k, len(gap))).indices
