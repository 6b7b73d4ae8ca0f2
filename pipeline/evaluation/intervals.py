"""A mean over values that come in clusters, with its standard error and 95 % interval; scipy is no dependency."""

import math
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

LEVEL = 0.95
_NORMAL_FROM = 100_000  # degrees of freedom; from there on the two quantiles differ by less than 3e-5


def clustered_mean(values: npt.NDArray[Any], clusters: npt.NDArray[np.int64]) -> dict[str, float | None]:
    """{"value", "standard_error", "low", "high"} of the mean of shares in [0, 1]; values, clusters: (n,), n > 0.

    The error is the cluster-robust (sandwich) one of a mean, sqrt(G/(G-1) * sum of squared cluster sums of residuals)/n
    over G clusters (Cameron and Miller, A practitioner's guide to cluster-robust inference, 2015); the interval is
    Student's with G - 1 degrees of freedom, clipped to [0, 1]. All but the value are None where there is one cluster.
    """
    values = np.asarray(values, dtype=np.float64)
    mean = float(values.mean())
    _, places = np.unique(clusters, return_inverse=True)
    sums = np.bincount(places, weights=values - mean)
    groups = len(sums)
    if groups < 2:
        return {"value": mean, "standard_error": None, "low": None, "high": None}
    error = math.sqrt(groups / (groups - 1) * float(sums @ sums)) / len(values)
    half = t_quantile(groups - 1) * error
    return {"value": mean, "standard_error": error, "low": max(0.0, mean - half), "high": min(1.0, mean + half)}


@lru_cache(maxsize=4096)
def t_quantile(freedom: int) -> float:
    """The t with P(|T| < t) = LEVEL for Student's T of so many degrees of freedom, by bisection to the last digits."""
    low, high = 0.0, 13.0  # 12.7 for one degree of freedom
    coefficients = _coefficients(min(freedom, _NORMAL_FROM))
    while high - low > 1e-12:
        middle = (low + high) / 2
        if _within(middle, min(freedom, _NORMAL_FROM), coefficients) < LEVEL:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _coefficients(freedom: int) -> npt.NDArray[np.float64]:
    """Of the finite series below: 1, 2/3, 2*4/(3*5), ... for an odd freedom, 1, 1/2, 1*3/(2*4), ... for an even one."""
    k = np.arange(1, freedom // 2 if freedom % 2 == 0 else (freedom - 1) // 2, dtype=np.float64)
    ratios = 2 * k / (2 * k + 1) if freedom % 2 else (2 * k - 1) / (2 * k)
    terms = np.concatenate([[1.0], np.cumprod(ratios)])
    return terms if freedom > 1 else terms[:0]


def _within(t: float, freedom: int, coefficients: npt.NDArray[np.float64]) -> float:
    """P(|T| < t): Abramowitz and Stegun 26.7.3 and 26.7.4, exact for whole degrees of freedom."""
    angle = math.atan2(t, math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    series = float(coefficients @ cosine ** (2.0 * np.arange(len(coefficients))))
    if freedom % 2:
        return 2 / math.pi * (angle + sine * cosine * series)
    return sine * series
