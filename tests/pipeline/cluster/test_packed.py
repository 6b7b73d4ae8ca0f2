"""What crosses to an actor and back arrives as it was."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cluster.packed import pack_rows, pack_scored, unpack_rows, unpack_scored
from pipeline.engine.process import Scored
from pipeline.sketches.head_plan import HeadSketch

IDS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5)


def ids(values):
    return np.array(values, np.int32)


@pytest.mark.slow
@given(st.lists(st.tuples(IDS, IDS), min_size=1, max_size=6))
def test_rows_arrive_as_they_were(rows):
    arrived = unpack_rows(*pickle.loads(pickle.dumps(pack_rows([(ids(a), ids(b)) for a, b in rows]))))
    assert [(a.tolist(), b.tolist()) for a, b in arrived] == rows
    assert {part.dtype for row in arrived for part in row} == {np.dtype(np.int32)}


@pytest.mark.parametrize("which", [(), (True, False, True), (False, False, False)])
def test_answers_arrive_as_they_were_with_the_sketches_that_were_asked_for(which):
    draw = np.random.default_rng(0)
    logps = [draw.normal(size=n).astype(np.float32) for n in (3, 1, 7)]
    numbers = [draw.normal(size=n).astype(np.float32) for n in (4, 2)]
    sketches = [HeadSketch(*numbers, 0.1 + n) if has else None for n, has in enumerate(which)]
    found = unpack_scored(pickle.loads(pickle.dumps(pack_scored(Scored(logps, 5, 2, sketches)))))
    assert [array.tolist() for array in found.logps] == [array.tolist() for array in logps]
    assert (found.shared_tokens, found.rescored, len(found.sketches)) == (5, 2, len(which))
    for arrived, sent in zip(found.sketches, sketches, strict=True):
        assert (arrived is None) == (sent is None)
        if arrived is not None:
            assert arrived.values.tolist() == sent.values.tolist() and arrived.audit.tolist() == sent.audit.tolist()
            assert arrived.grad_norm == sent.grad_norm and arrived.values.dtype == np.float32
