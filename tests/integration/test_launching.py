"""How ranks are started: by the stage, DeepSpeed's launcher, its hostfile, torchrun, srun; and what a dead rank says.

Here every process is started as people start it, so each costs its imports. Two "hosts" are this machine twice, over a
stand-in for pdsh that runs what it is given here; nothing else of DeepSpeed's launcher is replaced.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.training.checkpoints import complete_checkpoints
from tests import ROOT
from tests.integration.trainings import Finished, params_file, rank_pids, train_command

pytestmark = pytest.mark.slow

LONG = {"epochs": 8.0}  # 36 steps, so that there is time to kill
PDSH = """#!{python}
import subprocess, sys
words = sys.argv[1:]
hosts, command = words[words.index("-w") + 1].split(","), " ".join(words[words.index("-w") + 2 :])
if not command.startswith("pkill"):
    running = [subprocess.Popen(["bash", "-c", command.replace("%n", str(n))]) for n, _ in enumerate(hosts)]
    sys.exit(max(process.wait() for process in running))
"""


class Stage:
    """Runs of one cell as processes of their own."""

    def __init__(self, root: Path, out: Path, **settings):
        self.out, self.work = out, out / "work/training"
        self.words = train_command(root, out, params_file(out / "params.yaml", **settings))

    def start(self, *launcher: str, **environment: str) -> subprocess.Popen:
        environment = os.environ | {"REFCACHE_HOME": str(self.out / "work"), "OMP_NUM_THREADS": "1"} | environment
        words = [sys.executable, *launcher, *self.words]
        return subprocess.Popen(words, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)

    def finish(self, *launcher: str, **environment: str) -> Finished:
        stage = self.start(*launcher, **environment)
        _, said = stage.communicate(timeout=200)
        assert stage.returncode == 0, said
        return Finished(self.out, said)

    def newest(self) -> int:
        return max(
            (step for folder in self.work.glob("*/checkpoints") for step in complete_checkpoints(folder)), default=0
        )

    def wait_for_checkpoint_after(self, step: int, stage: subprocess.Popen) -> dict[int, int]:
        """Returns the ranks' processes."""
        deadline = time.monotonic() + 200
        while self.newest() <= step:
            assert stage.poll() is None and time.monotonic() < deadline, "ended before its checkpoint"
            time.sleep(0.01)
        [folder] = self.work.iterdir()
        return rank_pids(folder)

    def lose(self, rank: int, *launcher: str, **environment: str) -> str:
        """Kill one rank after the next checkpoint; returns what the stage says as it ends with exit code 1."""
        before = self.newest()
        stage = self.start(*launcher, **environment)
        ranks = self.wait_for_checkpoint_after(before, stage)
        os.kill(ranks[rank], signal.SIGKILL)
        _, said = stage.communicate(timeout=100)
        assert stage.returncode == 1, said
        assert f"rank {rank} (process {ranks[rank]} on " in said
        assert re.search(
            rf"was killed, after step \d+, .*signal SIGKILL.*from the checkpoint of step {self.newest()}", said
        )
        assert not any(is_alive(pid) for pid in ranks.values())
        assert not (self.out / "policy").exists()
        return said


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_stage_killed_after_a_checkpoint_takes_its_rank_along_and_is_continued_by_the_next(
    nursery, phase_one, tmp_path
):
    stage = Stage(phase_one, tmp_path, **LONG)
    # A rank killed while PyTorch compiles an extension leaves a lock there that all later ones wait for.
    extensions = tmp_path / "extensions"
    killed = stage.start(TORCH_EXTENSIONS_DIR=str(extensions))
    ranks = stage.wait_for_checkpoint_after(0, killed)
    assert set(ranks) == {0}
    assert not extensions.exists()
    killed.kill()
    killed.wait()
    deadline = time.monotonic() + 20
    while is_alive(ranks[0]):
        assert time.monotonic() < deadline, "an orphaned rank trains on"
        time.sleep(0.05)
    assert not (tmp_path / "policy").exists()
    done = nursery.train(phase_one, tmp_path, **LONG)
    assert done.summary["resumed_from_step"] >= 3
    assert done.equals(nursery.train(phase_one, tmp_path / "whole", **LONG))
    assert not list(stage.work.iterdir())


def test_two_hosts_then_deepspeeds_launcher_then_torchrun_go_on_from_one_another_when_a_rank_dies(
    nursery, phase_one, tmp_path
):
    settings = LONG | {"ranks": 2, "zero_stage": 2}
    stage = Stage(phase_one, tmp_path, **settings)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/pdsh").write_text(PDSH.format(python=sys.executable))
    (tmp_path / "bin/pdsh").chmod(0o755)
    (tmp_path / "hosts").write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    stage.lose(
        1,
        PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        REFCACHE_HOSTFILE=str(tmp_path / "hosts"),
        REFCACHE_LAUNCHER_OPTIONS="--no_ssh_check --master_addr 127.0.0.1",
    )
    stage.lose(0)
    reached = stage.newest()
    done = stage.finish("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    assert done.summary["resumed_from_step"] == reached > 3
    assert done.equals(nursery.train(phase_one, tmp_path / "whole", **settings))


def test_srun_with_two_tasks_trains_as_two_ranks(nursery, phase_one, tmp_path):
    ours = nursery.train(phase_one, tmp_path / "slurm", ranks=2, by="slurm")
    assert ours.summary["steps"] == 9 and len(ours.history) == 9
    assert ours.equals(nursery.train(phase_one, tmp_path / "torch", ranks=2))
