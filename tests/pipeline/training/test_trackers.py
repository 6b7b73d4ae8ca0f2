"""TensorBoard and Weights & Biases: curves named GROUP/COLUMN at their steps, imported only when asked for.

Neither library is a dependency, so stand-ins record what they are told.
"""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from pipeline.errors import RequestError
from pipeline.training.trackers import open_trackers, require_trackers

ROW = {"step": 7, "loss": 0.5, "rewards/margins": 1.5}


@pytest.fixture
def told(tmp_path, monkeypatch):
    """What the libraries were told, in order."""
    told = []
    monkeypatch.setenv("REFCACHE_HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)

    class SummaryWriter:
        def __init__(self, log_dir, purge_step):
            told.append((log_dir, purge_step))

        def add_scalar(self, tag, value, step):
            told.append((tag, value, step))

        def flush(self):
            told.append("flush")

        def close(self):
            told.append("close")

    def init(**options):
        told.append(options)
        return SimpleNamespace(
            define_metric=lambda *names, **options: None,
            log=lambda row: told.append(row),
            finish=lambda: told.append("close"),
        )

    board, wandb = ModuleType("torch.utils.tensorboard"), ModuleType("wandb")
    board.SummaryWriter, wandb.init = SummaryWriter, init
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return told


def run(name):
    [tracker] = open_trackers([name], title="dpo-0", run_id="r1", config={"batch_size": 8}, start=6)
    tracker.log("train", ROW)
    tracker.close()


def test_tensorboard_gets_a_scalar_for_every_column_and_forgets_steps_after_the_checkpoint(told, tmp_path):
    run("tensorboard")
    assert told == [
        (str(tmp_path / "tensorboard/dpo-0"), 7),
        ("train/loss", 0.5, 7),
        ("train/rewards/margins", 1.5, 7),
        "flush",
        "close",
    ]


def test_wandb_goes_on_under_the_runs_own_id_with_steps_as_the_axis(told, tmp_path):
    run("wandb")
    started, row, end = told
    assert (started["project"], started["name"], started["id"], started["resume"]) == (
        "refcache",
        "dpo-0",
        "r1",
        "allow",
    )
    assert started["config"] == {"batch_size": 8} and started["dir"] == str(tmp_path / "wandb")
    assert row == {"step": 7, "train/loss": 0.5, "train/rewards/margins": 1.5} and end == "close"


def test_a_library_that_is_missing_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("pipeline.training.trackers.find_spec", lambda name: None if name == "wandb" else object())
    require_trackers(["tensorboard"])
    with pytest.raises(RequestError, match=r"names wandb, which is not installed.*`pip install wandb`"):
        require_trackers(["tensorboard", "wandb"])


def test_nothing_is_opened_unless_asked_for():
    assert open_trackers([], title="dpo-0", run_id="r1", config={}, start=0) == []
