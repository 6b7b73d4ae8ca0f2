"""SIGKILL of dvc and of stages under it, and what `dvc repro`, `dvc exp run` and `dvc exp run --temp` do afterwards.

Five kills: two of dvc, three of the stage. dvc, the stage and its engine process are real; in the engine a stand-in
takes vLLM's place (tests/stand_in) and stops in a call of the test's choosing, so that the kill hits work half done.
"""

import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from cache import response_key
from pipeline.data.suites import INDEX
from pipeline.files import write_json
from tests import ROOT, stand_in
from tests.integration import kills
from tests.integration.test_kills import many_rows
from tests.scoring_project import ScoringProject, write_prepared
from tests.tiny import write_model

pytestmark = pytest.mark.slow


class DvcProject:
    """A git and DVC project with the score stage alone; its inputs are in git, so that temporary runs have them."""

    def __init__(self, folder, rows):
        self.folder, self.home = folder, folder / ".refcache"
        self.needed = {response_key(*row) for row in rows}
        self.asked, self.held = folder.with_name("asked"), folder.with_name("held")
        os.mkfifo(self.held)
        self._held = os.open(self.held, os.O_RDWR)  # also for writing, so that nobody waits for the other end
        (folder / ".dvc").mkdir(parents=True)
        for name in (".dvcignore", ".dvc/config"):
            shutil.copy(ROOT / name, folder / name)
        yaml = YAML(typ="safe", pure=True)
        score = yaml.load(ROOT / "dvc.yaml")["stages"]["score"]
        (folder / "dvc.yaml").write_text(json.dumps({"stages": {"score": score}}))
        params = yaml.load(ROOT / "params.yaml")
        params["score"] |= {"rows_per_call": 8, "drift_sample": 2}
        (folder / "params.yaml").write_text(json.dumps(params))
        (folder / ".gitignore").write_text("/.refcache/\n/data/reference/\n")
        write_prepared(folder / "data/prepared/pairs", rows)
        write_json(folder / "data/prepared/suites" / INDEX, [])
        write_model(folder / "models/reference")
        for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "start"]):
            identity = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
            subprocess.run(["git", *identity, *command], cwd=folder, check=True)

    def start(self, *words, hold=0):
        """Start dvc; the engine stops in call `hold` of the run (0: never)."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        wish = {"asked": str(self.asked), "hold": [hold, str(self.held)]}
        environment = os.environ | stand_in.environment(wish) | {"PATH": path, "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] += os.pathsep + str(ROOT)
        environment.pop("REFCACHE_HOME", None)
        self.asked.unlink(missing_ok=True)
        return subprocess.Popen(
            ["dvc", *words],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def stage(self, within=60):
        """Wait until the engine has stopped; returns its stage's pid, which the journal's lock names."""
        assert select.select([self._held], [], [], within)[0]
        os.read(self._held, 100)
        (lock,) = self.home.glob("journal/*/lock")
        return int(re.fullmatch(r"pid (\d+) on host .*\n", lock.read_text())[1])


def ended(pid):
    """Wait for the end of a process that is not our child."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], 20)[0])
    finally:
        os.close(descriptor)


def kill_dvc(dvc):
    dvc.kill()
    dvc.wait()
    dvc.stdout.close()  # not read to its end, which the orphaned stage holds open


def kill_stage(pid):
    os.kill(pid, signal.SIGKILL)
    assert ended(pid)


def finish(dvc, *, code=0):
    output, _ = dvc.communicate(timeout=120)
    assert dvc.returncode == code, output
    return output


def test_after_kills_of_dvc_and_of_stages_no_way_of_running_dvc_rescores_a_journalled_row(tmp_path, monkeypatch):
    project = DvcProject(tmp_path / "project", many_rows())
    before = Counter()

    def require_no_row_twice():
        nonlocal before
        assert not set(kills.asked(project.asked)) & before.keys()
        journalled = kills.journalled(project.home)
        assert before <= journalled and set(journalled.values()) <= {1}
        before = journalled

    dvc = project.start("repro", hold=4)
    orphan = project.stage()
    kill_dvc(dvc)
    require_no_row_twice()
    assert 0 < len(before) < len(project.needed) / 4
    refused = finish(project.start("repro"), code=255)
    assert f"is being written by pid {orphan} on host {socket.gethostname()}" in refused
    assert not project.asked.exists()
    kill_stage(orphan)

    dvc = project.start("exp", "run", hold=4)
    kill_stage(project.stage())
    finish(dvc, code=255)
    require_no_row_twice()

    dvc = project.start("exp", "run", "--temp", hold=4)
    orphan = project.stage()
    kill_dvc(dvc)
    kill_stage(orphan)
    require_no_row_twice()

    finish(project.start("exp", "run", "--temp"))
    require_no_row_twice()
    assert before.keys() == project.needed
    finish(project.start("repro"))
    assert kills.asked(project.asked) == []

    for name, value in stand_in.environment({}).items():
        monkeypatch.setenv(name, value)
    undisturbed = ScoringProject(tmp_path, project.folder / "models/reference", many_rows())
    undisturbed.score()
    assert kills.shards(project.folder / "data/reference/logps") == kills.shards(undisturbed.out)
