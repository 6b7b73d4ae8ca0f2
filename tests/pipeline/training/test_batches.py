"""Batches: every example once an epoch, the same for any number of ranks."""

import tracemalloc
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.training.batches import batch_indices, micro_batches, steps_for


@given(st.integers(1, 60), st.integers(1, 16), st.integers(0, 3), st.integers(1, 3))
def test_each_epoch_visits_every_example_exactly_once(n, batch_size, seed, epochs):
    steps = steps_for(epochs, n, batch_size)
    slots = [batch_indices(step, seed=seed, n_examples=n, batch_size=batch_size) for step in range(steps)]
    seen = np.concatenate(slots)[: epochs * n].reshape(epochs, n)
    assert (np.sort(seen, axis=1) == np.arange(n)).all()


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 16), st.integers(0, 3))
def test_grouped_epochs_visit_every_example_once_with_groups_in_one_piece_each(n, n_groups, batch_size, seed):
    groups = np.random.default_rng(seed).integers(0, n_groups, n)
    batches = [
        batch_indices(step, seed=seed, n_examples=n, batch_size=batch_size, groups=groups)
        for step in range(steps_for(2, n, batch_size))
    ]
    for epoch in np.concatenate(batches)[: 2 * n].reshape(2, n):
        assert sorted(epoch) == list(range(n))
        assert np.count_nonzero(np.diff(groups[epoch])) == len(set(groups.tolist())) - 1


@pytest.mark.parametrize("together", [False, True])
def test_the_next_batch_of_an_epoch_takes_no_memory_that_grows_with_the_examples(together):
    n = 200_000
    groups = np.arange(n) // 2 if together else None
    batch_indices(0, seed=0, n_examples=n, batch_size=64, groups=groups)
    tracemalloc.start()
    batch_indices(1, seed=0, n_examples=n, batch_size=64, groups=groups)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < n


def test_order_differs_between_seeds_and_epochs():
    def epoch(seed: int, number: int) -> list[int]:
        return batch_indices(number, seed=seed, n_examples=50, batch_size=50).tolist()

    assert epoch(0, 0) != epoch(0, 1) and epoch(0, 0) != epoch(1, 0) and epoch(0, 0) == epoch(0, 0)


@st.composite
def divided_batches(draw, **settings):
    """A batch with prompts of its own or shared, and its micro-batches on every rank; a prompt costs once a forward."""
    ranks, per_rank = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    random, n_groups = Random(draw(st.integers(0, 999))), draw(st.sampled_from([3, 12, 1000]))
    batch = np.array(random.sample(range(100), ranks * per_rank))
    groups = np.array([random.randrange(n_groups) for _ in range(100)])
    prompts, responses = ([random.randrange(1, 30) for _ in range(size)] for size in (1000, 100))

    def tokens(examples: np.ndarray) -> int:
        return sum(responses[i] for i in examples) + sum(prompts[g] for g in set(groups[examples].tolist()))

    limits = {name: draw(strategy) for name, strategy in settings.items()}
    parts = [micro_batches(batch, groups, tokens, rank=rank, ranks=ranks, **limits) for rank in range(ranks)]
    return batch, groups, tokens, limits, parts


@given(divided_batches(micro_batch_size=st.just(1), tokens_per_batch=st.integers(1, 400)))
def test_micro_batches_by_tokens_keep_their_bound_and_are_equally_many_on_every_rank(divided):
    batch, _, tokens, limits, parts = divided
    assert len({len(part) for part in parts}) == 1
    assert len({sum(map(len, part)) for part in parts}) == 1
    for micro in (micro for part in parts for micro in part):
        assert len(micro) == 1 or (len(micro) > 1 and tokens(micro) <= limits["tokens_per_batch"])
    assert sorted(np.concatenate([micro for part in parts for micro in part])) == sorted(batch)


def test_examples_of_a_group_share_a_micro_batch_where_it_has_room():
    groups = np.array([0, 1, 0, 2, 1, 0, 3, 2])
    parts = micro_batches(
        np.arange(8), groups, lambda e: 10 * len(e), rank=0, ranks=1, micro_batch_size=1, tokens_per_batch=30
    )
    assert all(len([part for part in parts if group in groups[part]]) == 1 for group in range(4))
    assert len(parts) == 3


def test_ranks_get_about_equally_many_tokens():
    lengths = np.random.default_rng(0).integers(10, 1000, 64)
    loads = []
    for rank in range(4):
        parts = micro_batches(
            np.arange(64),
            np.arange(64),
            lambda examples: int(lengths[examples].sum()),
            rank=rank,
            ranks=4,
            micro_batch_size=4,
            tokens_per_batch=None,
        )
        loads.append(lengths[np.concatenate(parts)].sum())
    assert max(loads) < 1.05 * min(loads)


@given(divided_batches(micro_batch_size=st.integers(1, 9), tokens_per_batch=st.none()))
def test_ranks_partition_the_batch_into_equally_many_nonempty_micro_batches(divided):
    batch, _, _, limits, parts = divided
    assert len({len(part) for part in parts}) == 1
    assert all(0 < len(micro) <= limits["micro_batch_size"] for part in parts for micro in part)
    assert sorted(np.concatenate([micro for part in parts for micro in part])) == sorted(batch)
