"""One-pass drift statistics agree with those that hold every value."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.reference.drift_statistics import DriftTally, drift_statistics

# Differences from rounding noise to gross errors, and exact agreement.
differences = st.one_of(st.just(0.0), st.floats(1e-9, 1e3), st.floats(-1e3, -1e-9))
rows = st.lists(st.lists(differences, min_size=1, max_size=30), min_size=1, max_size=40)


@pytest.mark.slow
@settings(max_examples=50)
@given(rows)
def test_tally_agrees_with_every_value_at_hand(rows):
    tally = DriftTally()
    drifts = [tally.add(np.array(row)) for row in rows]
    assert drifts == pytest.approx([abs(np.sum(row)) for row in rows], abs=1e-9)
    found = tally.statistics()
    per_token = np.abs(np.concatenate([np.array(row) for row in rows]))
    assert found["responses"] == len(rows) and found["tokens"] == len(per_token)
    for name, values in (("per_token", per_token), ("per_sequence", np.array(drifts))):
        exact = {"max": values.max(), "mean": values.mean(), "p99": np.quantile(values, 0.99, method="inverted_cdf")}
        assert found[name] == pytest.approx(exact, rel=3e-3, abs=1e-11)


@settings(max_examples=50)
@given(rows)
def test_stored_statistics_against_a_loop(rows):
    own = [np.zeros(len(row)) for row in rows]
    found = drift_statistics([np.array(row) for row in rows], own)
    flat = sorted(abs(value) for row in rows for value in row)
    sums = sorted(abs(sum(row)) for row in rows)
    for name, values in (("per_token", flat), ("per_sequence", sums)):
        place = 0.99 * (len(values) - 1)
        low, share = values[int(place)], place - int(place)
        high = values[min(int(place) + 1, len(values) - 1)]
        exact = {"max": values[-1], "mean": sum(values) / len(values), "p99": low + share * (high - low)}
        assert found[name] == pytest.approx(exact, rel=1e-4, abs=1e-9)


def test_a_million_tokens_take_no_more_memory_than_one():
    tally = DriftTally()
    tally.add(np.ones(1))
    before = tally._tokens._bins.nbytes
    for _ in range(10):
        tally.add(np.linspace(0, 1e-3, 100_000))
    assert tally._tokens._bins.nbytes == before
    assert tally.statistics()["per_token"]["p99"] == pytest.approx(0.99e-3, rel=3e-3)


def test_no_rows_are_zeros():
    assert DriftTally().statistics()["per_token"] == {"max": 0.0, "mean": 0.0, "p99": 0.0}
