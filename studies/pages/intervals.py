"""95 % confidence intervals of means: over independent values, and over pairs that share a prompt."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

NORMAL = 1.959963985  # 97.5 % quantile
# Of Student's t at 97.5 %, for 1 to 9 degrees of freedom; beyond, the expansion below has four digits.
SMALL = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157)


class Mean(NamedTuple):
    """A mean and half the width of its 95 % interval; NaN where there is one value only."""

    value: float
    half: float

    @property
    def low(self) -> float:
        return self.value - self.half

    @property
    def high(self) -> float:
        return self.value + self.half

    def show(self, digits: int = 2) -> str:
        """`-1.23 ± 0.45`, with a real minus."""
        half = "" if math.isnan(self.half) else f" ± {self.half:.{digits}f}"
        return f"{self.value:.{digits}f}{half}".replace("-", "−")


def t_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t (Fisher and Cornish's expansion in 1/freedom; Abramowitz and Stegun 26.7.5)."""
    if freedom < 1:
        return math.nan
    if freedom <= len(SMALL):
        return SMALL[freedom - 1]
    z = NORMAL
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return float(z + sum(term / freedom**power for power, term in enumerate(terms, start=1)))


def mean_interval(values: Sequence[float] | Floats) -> Mean:
    """The mean of independent values (n,): seeds, or one value a prompt."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2:
        return Mean(float(array.mean()), math.nan)
    error = array.std(ddof=1) / math.sqrt(len(array))
    return Mean(float(array.mean()), float(t_quantile(len(array) - 1) * error))


def clustered_interval(values: Sequence[float] | Floats, prompts: Sequence[bytes]) -> Mean:
    """The mean of pairs (n,), where those of one prompt may be alike: the prompts are what was drawn.

    Cluster-robust standard error of a mean (Liang and Zeger 1986) with the usual factor G/(G-1) and t of G-1.
    """
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    _, group = np.unique(np.array(prompts, dtype=object), return_inverse=True)
    sums = np.bincount(group, weights=array - mean)
    n_groups = len(sums)
    if n_groups < 2:
        return Mean(mean, math.nan)
    error = math.sqrt(n_groups / (n_groups - 1) * float((sums**2).sum())) / len(array)
    return Mean(mean, t_quantile(n_groups - 1) * error)
