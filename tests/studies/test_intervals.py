"""Intervals against closed forms of Student's t and against simulation."""

import math

import numpy as np
import pytest

from studies.pages.intervals import Mean, clustered_interval, mean_interval, t_quantile


def cumulative(t: float, freedom: int) -> float:
    """P(T <= t) of Student's t by integrating its density."""
    x = np.linspace(0, t, 200_001)
    scale = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
    return 0.5 + float(np.trapezoid(scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2), x))


@pytest.mark.parametrize("freedom", [*range(1, 15), 29, 100])
def test_t_quantile_leaves_two_and_a_half_per_cent_above(freedom):
    assert cumulative(t_quantile(freedom), freedom) == pytest.approx(0.975, abs=2e-5)


def test_quantiles_with_a_closed_form():
    assert t_quantile(1) == pytest.approx(math.tan(math.pi * 0.475), rel=1e-5)
    assert t_quantile(2) == pytest.approx(0.95 / math.sqrt(2 * 0.975 * 0.025), rel=1e-5)
    assert math.isnan(t_quantile(0))


def test_interval_of_three_seeds():
    mean = mean_interval([1.0, 2.0, 3.0])
    assert mean.value == 2.0
    assert mean.half == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert math.isnan(mean_interval([1.0]).half)


def test_pairs_of_their_own_prompts_are_independent_values():
    values = np.random.default_rng(0).normal(size=40)
    assert clustered_interval(values, [bytes([i]) for i in range(40)]) == pytest.approx(mean_interval(values))


def test_copies_of_a_prompts_pairs_add_no_certainty():
    values = np.random.default_rng(1).normal(size=20)
    prompts = [bytes([i]) for i in range(20)]
    assert clustered_interval(np.repeat(values, 5), np.repeat(np.array(prompts, dtype=object), 5)) == pytest.approx(
        clustered_interval(values, prompts)
    )


def test_intervals_are_shown_with_a_real_minus():
    assert Mean(-1.234, 0.456).show() == "−1.23 ± 0.46"
    assert Mean(2.0, math.nan).show(1) == "2.0"
