"""Held-out pairs are divided among ranks so that each is measured once and every rank does as many forwards."""

from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.splitting import held_out_rows
from pipeline.params import SftParams
from pipeline.training.held_out import HeldOutPairs


@given(
    pairs=st.integers(1, 30),
    ranks=st.integers(1, 5),
    size=st.integers(1, 6),
    bound=st.none() | st.integers(1, 300),
    seed=st.integers(0, 9),
)
def test_every_pair_counts_once_and_ranks_forward_alike_often(pairs, ranks, size, bound, seed):
    lengths = np.random.default_rng(seed).integers(1, 100, pairs)
    task = SimpleNamespace(lengths=lengths, tokens=lambda examples: lengths[examples].sum())
    held_out = HeldOutPairs(task, SftParams(micro_batch_size=size, tokens_per_batch=bound), every=1)
    shares = [held_out.micro_batches(SimpleNamespace(rank=rank, ranks=ranks)) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    counted = np.concatenate([micro for share in shares for micro, counts in share if counts])
    assert sorted(counted.tolist()) == list(range(pairs))
    for micro in (micro for share in shares for micro, _ in share):
        assert len(micro) <= size if bound is None else len(micro) == 1 or lengths[micro].sum() <= bound


@given(st.integers(1, 200), st.integers(1, 250))
def test_the_sample_is_the_same_every_time_and_as_large_as_asked(pairs, most):
    rows = held_out_rows(pairs, most)
    assert rows.tolist() == sorted(set(rows.tolist())) == held_out_rows(pairs, most).tolist()
    assert len(rows) == min(pairs, most) and rows[-1] < pairs
