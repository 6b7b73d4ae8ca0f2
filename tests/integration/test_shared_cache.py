"""A team's journey through an S3 server: score, push; clone, pull, go on, and nothing is scored twice."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from ruamel.yaml import YAML

from cache import response_key
from pipeline.data.suites import INDEX
from pipeline.files import write_json
from tests import ROOT, stand_in
from tests.integration import kills
from tests.object_storage import BUCKET, storage
from tests.scoring_project import write_prepared
from tests.tiny import write_model

pytestmark = pytest.mark.slow

ROWS = [([1, 5, 9 + i // 2], [2, 3 + i, 7]) for i in range(24)]


class Clone:
    """One person's clone, with a stand-in for vLLM; `asked` says which rows the engine was asked for."""

    def __init__(self, folder):
        self.folder, self.asked = folder, folder.with_name(f"{folder.name}-asked")

    def run(self, *words, code=0):
        environment = os.environ | stand_in.environment({"asked": str(self.asked)})
        environment["PATH"] = os.pathsep.join([str(os.path.dirname(sys.executable)), os.environ["PATH"]])
        environment["PYTHONPATH"] += os.pathsep + str(ROOT)
        environment.pop("REFCACHE_HOME", None)
        done = subprocess.run(words, cwd=self.folder, env=environment, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def commit(self, message):
        self.run("git", "add", "-A")
        self.run("git", "-c", "user.name=test", "-c", "user.email=test@example.com", "commit", "-qm", message)

    def published(self):
        return {path.name: path.read_bytes() for path in (self.folder / "data/reference/logps").iterdir()}


def write_project(folder):
    """The pipeline from score on, and a study; what comes before is in git, and little of it was ever run."""
    (folder / ".dvc").mkdir(parents=True)
    for name in (".dvcignore", ".dvc/config", ".gitignore", "studies/dvc.yaml", "studies/params.yaml"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    with (folder / ".gitignore").open("a") as ignored:
        ignored.write("!/data/prepared/\n!/models/\n")
    yaml = YAML(typ="safe", pure=True)
    pipeline = yaml.load(ROOT / "dvc.yaml")["stages"]
    wanted = {name: pipeline[name] for name in ("score", "sketch", "constraint", "train")}
    (folder / "dvc.yaml").write_text(json.dumps({"stages": wanted}))
    params = yaml.load(ROOT / "params.yaml")
    params["score"]["drift_sample"] = 2
    (folder / "params.yaml").write_text(json.dumps(params))
    write_prepared(folder / "data/prepared/pairs", ROWS)
    write_json(folder / "data/prepared/suites" / INDEX, [])
    write_model(folder / "models/reference")


@pytest.fixture
def server():
    with storage() as running:
        yield running


def test_a_colleague_clones_pulls_and_goes_on_and_nothing_is_scored_again(server, tmp_path):
    owner, early, colleague = (Clone(tmp_path / name) for name in ("owner", "early", "colleague"))
    write_project(owner.folder)
    owner.run("git", "init", "-q")
    owner.run("dvc", "repro", "score")
    assert sorted(kills.asked(owner.asked)) == sorted(response_key(*row) for row in ROWS)
    owner.run("dvc", "remote", "add", "-d", "team", f"s3://{BUCKET}/refcache")
    owner.commit("scored")

    owner.run("git", "clone", "-q", ".", str(early.folder))
    early.run("dvc", "pull", "-d", "score", code=1)  # rather than let `dvc repro` score what was not pushed yet

    owner.run("dvc", "push")
    owner.run("git", "clone", "-q", ".", str(colleague.folder))
    committed = b"".join(file.read_bytes() for file in colleague.folder.rglob("*") if file.is_file())
    assert b"refcache" in committed and not [word for word in server.secrets() if word.encode() in committed]
    colleague.run("dvc", "pull", "-d", "score")
    assert colleague.published() == owner.published()
    assert "Stage 'score' didn't change, skipping" in colleague.run("dvc", "repro", "score")
    assert not colleague.asked.exists()
    assert not (colleague.folder / ".refcache/journal").exists()  # no remote has it, and none is needed
