"""How the loss falls with the number of features and the steps of training: a fitted law, with intervals.

    L(x_1, ..., x_m) = c + a_1 x_1^-b_1 + ... + a_m x_m^-b_m

With one quantity, the features, it is a power law with a floor; with features and steps together its exponents say
which of the two a next unit of compute is better spent on. A law is only as good as what it foretells: the points of
the largest first quantity are also fitted without, and foretold.

Sources: Templeton et al. 2024, Scaling Monosemanticity, "Scaling laws" (loss against compute, features and steps); Gao
et al. 2024, arXiv:2406.04093, section 3 (the irreducible loss and the joint law); the form, Hoffmann et al. 2022,
arXiv:2203.15556, equation 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from mechscope.dictionaries.evaluating.report import DictionaryReport, Measure
from mechscope.errors import DictionaryError
from mechscope.tasks.intervals import interval

DRAWS = 200
EXPONENTS = (0.01, 5.0)
"""Outside these a power is a constant, or falls at once."""


def scaling_law(
    quantities: Mapping[str, Sequence[float]], losses: Sequence[float], draws: int = DRAWS, seed: int = 0
) -> DictionaryReport:
    """This fits the law to losses [n] measured at quantities {name: [n]}, and says how sure its exponents are.

    quantities: {"features": [...], "steps": [...]}, or features alone; the first is the one that is extrapolated.
    draws: refits with residuals drawn again, of which the 95 % intervals are. The control is the fit of losses in a
    random order. Measures: "exponent", "coefficient" of each quantity, "floor", "R2", and "foretold", the mean
    relative error at the largest first quantity of a law that was fitted without it.

    Raises DictionaryError where a quantity has fewer than four values, or three where it is not the first.

    >>> n = [64, 128, 256, 512, 1024]
    >>> report = scaling_law({"features": n}, [0.1 + 3 * x**-0.5 for x in n], draws=10)
    >>> round(report["exponent", "features"].value, 2), round(report["floor"].value, 2)
    (0.5, 0.1)
    """
    names = list(quantities)
    x, y = np.array([quantities[name] for name in names], dtype=float), np.asarray(losses, dtype=float)
    for i, name in enumerate(names):
        if len(set(x[i])) < (4, 3)[i > 0]:
            raise DictionaryError(
                f"{name!r} has {len(set(x[i]))} values: a law with a floor needs {(4, 3)[i > 0]} or more of it"
            )
    random = np.random.default_rng(seed)
    fitted = _fit(x, y)
    foretold = _law(x, fitted)
    residuals = y - foretold
    # A fit of m parameters leaves residuals too small by this much.
    residuals = residuals * (len(y) / max(1, len(y) - len(fitted))) ** 0.5
    refits = np.array([_fit(x, foretold + random.choice(residuals, len(y)), fitted) for _ in range(draws)])
    low, high = interval(refits)
    largest = x[0] == x[0].max()
    error = np.abs(_law(x[:, largest], _fit(x[:, ~largest], y[~largest])) / y[largest] - 1).mean()
    mixed = y[random.permutation(len(y))]
    r2 = _r2(y, foretold)
    measures = [Measure("floor", *_with(fitted, low, high, 0), about="the loss that no size or time mends")]
    for i, name in enumerate(names):
        measures.append(Measure("exponent", *_with(fitted, low, high, 2 + 2 * i), of=name))
        measures.append(Measure("coefficient", *_with(fitted, low, high, 1 + 2 * i), of=name))
    measures += [
        Measure("R2", r2, ideal=1.0),
        Measure("R2, shuffled", _r2(mixed, _law(x, _fit(x, mixed))), control=True, about="losses in a random order"),
        Measure("foretold", float(error), ideal=0.0, about=f"relative error at {names[0]} = {x[0].max():g}, left out"),
    ]
    law = " + ".join(f"{fitted[1 + 2 * i]:.3g} {name}^-{fitted[2 + 2 * i]:.3f}" for i, name in enumerate(names))
    return DictionaryReport(
        question=f"the loss as a law of {' and '.join(names)}, over {len(y)} dictionaries",
        verdict=f"{fitted[0]:.3g} + {law}; R2 {r2:.4f}, the largest foretold within {error:.1%}",
        measures=tuple(measures),
        choices={"intervals": f"{draws} refits with residuals drawn again"},
        tensors={"quantities": torch.from_numpy(x), "losses": torch.from_numpy(y), "law": torch.from_numpy(foretold)},
    )


def _law(x: np.ndarray, p: np.ndarray) -> np.ndarray:
    """This is the losses at x [quantities, n] of the parameters (c, a_1, b_1, ...)."""
    return p[0] + (p[1::2, None] * x ** -p[2::2, None]).sum(0)


def _fit(x: np.ndarray, y: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
    """This is the parameters of least squares, found with each quantity in units of its geometric mean."""
    from scipy.optimize import curve_fit

    unit = np.exp(np.log(x).mean(1))
    scale = max(float(np.ptp(y)), 1e-12)
    if start is None:
        first = np.array([y.min(), *np.tile([scale / len(x), 0.5], len(x))])
    else:
        first = start.copy()
        first[1::2] *= unit ** -first[2::2]
    m = len(x)
    low = np.array([0.0, *np.tile([0.0, EXPONENTS[0]], m)])
    high = np.array([max(y.max(), 1e-12), *np.tile([np.inf, EXPONENTS[1]], m)])

    def law(_: np.ndarray, *p: float) -> np.ndarray:
        return _law(x / unit[:, None], np.array(p)) / scale

    first = np.clip(first, low + 1e-9, np.where(np.isinf(high), high, high - 1e-9))
    found, _ = curve_fit(law, np.arange(len(y)), y / scale, first, bounds=(low, high), max_nfev=5000)
    found[1::2] *= unit ** found[2::2]
    return found


def _r2(y: np.ndarray, of: np.ndarray) -> float:
    return float(1 - np.square(y - of).sum() / np.square(y - y.mean()).sum())


def _with(value: np.ndarray, low: np.ndarray, high: np.ndarray, i: int) -> tuple[float, float, float]:
    return float(value[i]), float(low[i]), float(high[i])
