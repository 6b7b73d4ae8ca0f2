"""Starting ranks: which runs share checkpoints, and that two at once are refused."""

import fcntl

import pytest

from pipeline.errors import RunFailed
from pipeline.params import SftParams
from pipeline.runs.launch import launch
from pipeline.runs.work_folder import work_folder
from pipeline.training.job import Job


def test_a_second_run_is_refused_and_leaves_the_first_ones_files_alone(tmp_path):
    for name in ("job.json", "summary.json", "history.tsv"):
        (tmp_path / name).write_text("the first run's")
    job = Job(kind="sft", title="sft", paths={}, loop={}, settings={}, seed=0)
    with (tmp_path / "lock").open("w") as first:
        first.write("4711")
        first.flush()
        fcntl.flock(first, fcntl.LOCK_EX)
        with pytest.raises(RunFailed, match=r"in use by another run.*4711"):
            launch(job, tmp_path, loop=SftParams(), n_examples=8)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {
        "lock": "4711",
        "job.json": "the first run's",
        "summary.json": "the first run's",
        "history.tsv": "the first run's",
    }


TWO = {"ranks": 2, "zero_stage": 2}


@pytest.mark.parametrize(
    ("before", "after", "goes_on"),
    [
        ({}, {"ranks": 2}, True),  # float32 without ZeRO: every rank holds all
        ({}, {"checkpoint_every": 7, "keep_checkpoints": 3, "activation_checkpointing": True}, True),
        (TWO, TWO | {"ranks": 4}, False),
        (TWO, TWO | {"zero_stage": 1}, False),
        (TWO, TWO | {"zero_stage": 3}, False),
        (TWO, TWO | {"zero_stage": 0}, False),
        (TWO, TWO | {"optimizer_offload": True}, False),
        ({"dtype": "bfloat16"}, {"dtype": "bfloat16", "ranks": 2}, False),  # ZeRO 1, for its master weights
    ],
)
def test_ranks_and_zero_decide_whether_a_run_goes_on_from_anothers_checkpoints(before, after, goes_on):
    """Otherwise it begins anew beside them, in a folder that differs in the layout alone, by which it names them."""
    first, second = (
        work_folder(Job(kind="sft", title="sft", paths={}, loop=SftParams(**loop).model_dump(), settings={}, seed=0))
        for loop in (before, after)
    )
    assert (first == second) == goes_on
    assert first.name.partition("-zero")[0] == second.name.partition("-zero")[0]
