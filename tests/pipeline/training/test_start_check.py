"""The policy at step 0 must answer as the reference cache says."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.errors import RunFailed
from pipeline.objectives import PairLogps
from pipeline.training.start_check import StartCheck
from tests.tiny import write_pairs


@pytest.fixture(scope="module")
def run_batch(tmp_path_factory):
    pairs = write_pairs(tmp_path_factory.mktemp("pairs"), 110, responses=2, test_share=10 / 110)

    def run(off, *, tolerance=0.25, micro=4):
        """The first batch of pairs 10, 11, ... in micro-batches, as the loop does it; returns the sums left over."""
        check, off = StartCheck(Path("logps"), pairs, tolerance), np.array(off)
        sums = {"loss": 1.0}
        for start in range(0, off.shape[1], micro):
            part = off[:, start : start + micro]
            for name, value in check.observe(pair_logps(part), 10 + start + np.arange(part.shape[1])).items():
                assert not value.requires_grad
                sums[name] = sums.get(name, 0.0) + float(value)
        check.judge(sums, off.shape[1])
        return sums

    return run


def pair_logps(off):
    """off: (2, B), what the cached chosen and rejected log-probs are below the policy's."""
    off = torch.tensor(off, dtype=torch.float32)
    policy, ones = torch.full_like(off, -50.0).requires_grad_(), torch.ones(off.shape[1])
    cached = policy.detach() - off
    return PairLogps(policy[0], policy[1], cached[0], cached[1], ones, ones)


def test_drift_within_the_tolerance_passes_and_leaves_no_metric_behind(run_batch):
    assert run_batch(np.full((2, 8), 0.2)) == {"loss": 1.0}


def test_honest_rounding_in_bf16_passes_also_with_one_pair_a_micro_batch(run_batch):
    """A normal spread whose 99th percentile is the tolerance, as the gate before training allows."""
    off = np.random.default_rng(1).normal(0, 0.25 / 2.576, (2, 90))
    assert abs(off).max() > 0.25
    run_batch(off, micro=1)


def test_a_single_row_far_off_is_named(run_batch):
    off = np.zeros((2, 8))
    off[1, 5] = -1.0
    with pytest.raises(RunFailed, match=r"by 1 nats in the rejected response of tiny\.jsonl:26, .*--drift --repair"):
        run_batch(off)


def test_rows_that_are_all_a_little_too_far_off_stop_the_run_and_the_farthest_is_named(run_batch):
    off = np.full((2, 8), 0.3)
    off[0, 2] = 0.4
    with pytest.raises(RunFailed, match=r"0\.306 nats on average \(0\.4 nats in the chosen response of .*:23\)"):
        run_batch(off)


def test_later_batches_are_free():
    StartCheck(Path("logps"), Path("pairs"), 0.25).judge({"loss": 0.1}, 8)
