"""Batches: every example once an epoch, the same for any number of ranks."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.batches import batch_indices, micro_batches, steps_for


@given(st.integers(1, 60), st.integers(1, 16), st.integers(0, 3), st.integers(1, 3))
def test_each_epoch_visits_every_example_exactly_once(n, batch_size, seed, epochs):
    steps = steps_for(epochs, n, batch_size)
    slots = [batch_indices(step, seed=seed, n_examples=n, batch_size=batch_size) for step in range(steps)]
    seen = np.concatenate(slots)[: epochs * n].reshape(epochs, n)
    assert (np.sort(seen, axis=1) == np.arange(n)).all()


def test_order_differs_between_seeds_and_epochs():
    def epoch(seed: int, number: int) -> list[int]:
        return batch_indices(number, seed=seed, n_examples=50, batch_size=50).tolist()

    assert epoch(0, 0) != epoch(0, 1) and epoch(0, 0) != epoch(1, 0) and epoch(0, 0) == epoch(0, 0)


@given(st.integers(1, 4), st.integers(1, 8), st.integers(1, 9), st.randoms())
def test_ranks_partition_the_batch_into_equally_many_nonempty_micro_batches(ranks, per_rank, micro_size, random):
    batch = np.array(random.sample(range(100), ranks * per_rank))
    lengths = np.array([random.randrange(1, 30) for _ in range(100)])
    parts = [
        micro_batches(batch, lengths, rank=rank, ranks=ranks, micro_batch_size=micro_size) for rank in range(ranks)
    ]
    assert len({len(part) for part in parts}) == 1
    assert all(0 < len(micro) <= micro_size for part in parts for micro in part)
    assert sorted(np.concatenate([micro for part in parts for micro in part])) == sorted(batch)
