"""What the sketches S A of n responses say about their gradients A: spectrum, effective dimension, and for how much.

Numbers are float64. Notation: n responses; N independent numbers in a sketch; v_i, i = 1..n: eigenvalues of the Gram
matrix (S A)^T (S A), descending; e_i: energy of the same right singular vectors by the audit sketch, to which they were
not fitted. d(mu) = sum_i v_i / (v_i + mu), the effective dimension: in how many directions a constraint outweighs mu.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# The mean loss over pairs bends by at most a quarter of (delta_w - delta_l)^2 / 2 a pair: on average over directions as
# much as a ridge of 1/4.
LOSS_RIDGE = 0.25
STEPS = 200  # of the search for a root, over 18 decades of mu


class Spectrum(NamedTuple):
    """values: v, (n,) descending. audited: e, (n,)."""

    values: Array
    audited: Array

    def tail(self, rank: int) -> tuple[float, float]:
        """Share of the energy outside the leading `rank` directions, as the sketch has it and as the audit does."""
        sketch, audit = (float(each[rank:].sum() / each.sum()) if each.any() else 0.0 for each in self)
        return sketch, audit


def decompose(gram: Array, audit: Array) -> Spectrum:
    """The spectrum of `gram`, (n, n), which is overwritten. audit: (n, audit width), the audit sketches."""
    values, vectors = np.linalg.eigh(gram)
    values, vectors = values[::-1], vectors[:, ::-1]
    return Spectrum(values.clip(min=0), np.square(audit.T @ vectors).sum(axis=0))


def penalty_scale(n: int, null_weight: float, ridge: float) -> float:
    """mu of the AuxDPO loss: null_weight ||A delta / n||^2 against ridge mean(delta^2) and the loss's own curvature.

    Their second derivatives along a right singular vector are 2 null_weight v / n^2, 2 ridge / n, and LOSS_RIDGE for
    the ridge at offsets of zero and a policy at the reference, where every pair bends most.
    """
    return n * (ridge + LOSS_RIDGE) / null_weight


def effective_dimension(values: Array, mu: float) -> float:
    return float((values / (values + mu)).sum())


def true_dimension(values: Array, numbers: float, mu: float) -> float | None:
    """Effective dimension of A itself at `mu`, from the spectrum of its sketch; None where that is too small to tell.

    The sketch's at mu_s is that of A at mu_s / (1 - d_s / N), in the limit of many responses and numbers (Silverstein
    and Bai 1995; d_s is the sketch's own). So mu_s = mu (1 - d_s(mu_s) / N) is solved for, its largest root.
    """
    if not values.any() or np.isinf(numbers):
        return effective_dimension(values, mu)
    grid = mu * np.logspace(0, -18, STEPS)
    surplus = [at - mu * (1 - effective_dimension(values, at) / numbers) for at in grid]
    below = next((i for i, value in enumerate(surplus) if value < 0), None)
    if below is None:
        return None
    low, high = grid[below], grid[below - 1]
    for _ in range(60):
        middle = (low * high) ** 0.5
        if middle - mu * (1 - effective_dimension(values, middle) / numbers) < 0:
            low = middle
        else:
            high = middle
    return effective_dimension(values, high)


def fitted_ratio(spectrum: Spectrum, mu: float) -> float:
    """Penalty by the sketch over penalty by the audit, of offsets fitted to the sketch: below 1, it flatters them.

    The offsets minimise ||delta - c||^2 + ||S A delta||^2 / mu; both penalties are expectations over c ~ N(0, I).
    """
    left = np.square(mu / (spectrum.values + mu))  # of each direction's square
    truth = float((spectrum.audited * left).sum())
    return float((spectrum.values * left).sum()) / truth if truth else 1.0


def predicted_ratio(dimension: float, numbers: float) -> float:
    """What `fitted_ratio` should be: (1 - d_s / N)^2, as in generalised cross-validation (Golub, Heath, Wahba 1979)."""
    return max(0.0, 1 - dimension / numbers) ** 2


def numbers_for(dimension: float, ratio: float) -> float:
    """N at which offsets fitted to a sketch see the share `ratio` of the true penalty."""
    return float(dimension / (1 - ratio**0.5))
