"""Starting ranks: a second run of the same training is refused before it touches the first one's files."""

import fcntl

import pytest

from pipeline.errors import RunFailed
from pipeline.launch import Job, launch
from pipeline.params import SftParams


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
