"""Killed and run again: history, held-out measurements and final weights are those of a run nobody killed, bit by bit.

Ranks are forks (rank_nursery.py) that get SIGKILL at chosen moments; nothing else about them is made up.
"""

import pytest

from pipeline.training.checkpoints import complete_checkpoints, place
from tests.integration.trainings import RanksEnded, without_speed
from tests.tiny import write_reference_cache

pytestmark = pytest.mark.slow

EVALUATED = {"evaluate_every": 4, "evaluate_pairs": 11}
LORA = {"lora": {"r": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]}}
BF16 = {"dtype": "bfloat16", "learning_rate": 3e-2}


def checkpoints(home):
    [folder] = home.glob("training/*/checkpoints")
    return folder


class Case:
    """One training that is killed over and over in one workspace."""

    def __init__(self, nursery, root, out, **settings):
        self.nursery, self.root, self.out, self.settings = nursery, root, out, settings

    def killed(self, rank, what, n):
        """Run until that moment; returns the steps of the checkpoints that are then there."""
        with pytest.raises(RanksEnded) as caught:
            self.nursery.train(self.root, self.out, moments=((rank, what, n),), **self.settings)
        assert caught.value.codes[rank] == -9, caught.value.said
        assert not (self.out / "policy").exists()
        folders = list(self.out.glob("work/training/*/checkpoints"))
        return complete_checkpoints(folders[0]) if folders else []

    def finished(self):
        return self.nursery.train(self.root, self.out, **self.settings)


def test_kills_at_every_kind_of_moment_leave_no_trace(nursery, phase_one, one_rank, tmp_path):
    case = Case(nursery, phase_one, tmp_path, **EVALUATED)
    assert case.killed(0, "loss", 2) == []
    assert case.killed(0, "row", 2) == []
    assert case.killed(0, "save", 1) == []
    assert case.killed(0, "seal", 1) == []  # its files are there, its marker is not
    assert case.killed(0, "sealed", 1) == [3]
    assert case.killed(0, "update", 5) == [3]  # between two micro-batches of the fifth step
    assert case.killed(0, "seal", 1) == [3]
    assert case.killed(0, "sealed", 1) == [3, 6]
    assert case.killed(0, "row", 5) == [3, 6]  # after the last step's rows
    assert case.killed(0, "saved model", 1) == [6, 9]
    done = case.finished()
    assert done.summary["resumed_from_step"] == 9  # saved once more, nothing is trained again
    assert done.equals(one_rank)
    assert not list((tmp_path / "work/training").iterdir())  # checkpoints go when the run is published


@pytest.mark.parametrize(
    "settings",
    [
        {"ranks": 2, "zero_stage": 0},
        {"ranks": 2, "zero_stage": 2, **BF16},
        {"ranks": 2, "zero_stage": 3},
        {"trainable": LORA, **BF16},
    ],
    ids=["two ranks", "two ranks, ZeRO-2, bf16", "two ranks, ZeRO-3", "LoRA, bf16"],
)
def test_every_layout_resumes_to_its_own_uninterrupted_run(nursery, phase_one, tmp_path, settings):
    for name in ("pairs", "model"):
        (tmp_path / name).symlink_to(phase_one / name)
    dtype = settings.get("dtype", "float32")
    write_reference_cache(tmp_path / "logps", phase_one / "pairs", phase_one / "model", dtype=dtype)
    whole = nursery.train(tmp_path, tmp_path / "whole", **EVALUATED, **settings)
    case = Case(nursery, tmp_path, tmp_path / "killed", **EVALUATED, **settings)
    ranks = settings.get("ranks", 1)
    updates = {1: 3, 2: 2}[ranks]  # calls a step, one a micro-batch
    assert case.killed(ranks - 1, "update", 4 * updates + 1) == [3]
    assert case.killed(0, "seal", 1) == [3]
    done = case.finished()
    assert done.summary["resumed_from_step"] == 3
    assert done.equals(whole)


def test_a_torn_checkpoint_is_skipped_for_the_one_before_with_a_message(nursery, phase_one, one_rank, tmp_path):
    case = Case(nursery, phase_one, tmp_path, **EVALUATED)
    assert case.killed(0, "sealed", 2) == [3, 6]
    newest = place(checkpoints(tmp_path / "work"), 6)
    largest = max(newest.iterdir(), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-7])
    done = case.finished()
    assert f"The checkpoint of step 6 is damaged ({largest.name} has" in done.said
    assert done.summary["resumed_from_step"] == 3
    assert done.equals(one_rank)


def test_as_many_checkpoints_are_kept_as_asked_for(nursery, phase_one, tmp_path):
    case = Case(nursery, phase_one, tmp_path, checkpoint_every=1, keep_checkpoints=3)
    assert case.killed(0, "row", 8) == [5, 6, 7]
    folder = checkpoints(tmp_path / "work")
    assert sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) == [
        place(folder, step).name for step in (5, 6, 7)
    ]


def test_a_finished_training_whose_saving_was_cut_short_only_saves(nursery, phase_one, tmp_path):
    case = Case(nursery, phase_one, tmp_path, checkpoint_every=4)
    assert case.killed(0, "saved model", 1) == [8, 9]
    assert case.finished().summary["resumed_from_step"] == 9


def test_without_zero_the_number_of_ranks_may_change(nursery, phase_one, one_rank, tmp_path):
    """Sums are added in another order from there on, so equal to rounding."""
    two = Case(nursery, phase_one, tmp_path, ranks=2, **EVALUATED)
    assert two.killed(1, "update", 9) == [3]
    done = nursery.train(phase_one, tmp_path, **EVALUATED)
    assert done.summary["resumed_from_step"] == 3
    for row, expected in zip(without_speed(done.history), without_speed(one_rank.history), strict=True):
        assert row == pytest.approx(expected, abs=1e-4, rel=1e-4)


def test_checkpoints_of_another_zero_layout_are_left_alone_and_the_run_begins_anew_saying_so(
    nursery, phase_one, one_rank, tmp_path
):
    other = Case(nursery, phase_one, tmp_path, ranks=2, zero_stage=2, **EVALUATED)
    assert other.killed(1, "update", 9) == [3]
    done = nursery.train(phase_one, tmp_path, **EVALUATED)
    assert "checkpoints up to step 3" in done.said and "zero2-ranks2; this run: zero0" in done.said
    assert done.summary["resumed_from_step"] == 0
    assert done.equals(one_rank)
    assert complete_checkpoints(checkpoints(tmp_path / "work")) == [3]
