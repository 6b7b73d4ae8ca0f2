"""Drift on demand against real transformers: what is flagged, what is scored again, and what stays as it was."""

import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM

from cache import (
    CacheCorrupt,
    CacheIncomplete,
    CacheLocked,
    CacheMismatch,
    Journal,
    open_reference,
    response_key,
    verify,
)
from pipeline.data.tables import read_pairs, read_responses
from pipeline.engine import supervision
from pipeline.errors import RunFailed
from pipeline.params import ScoreParams
from pipeline.reference import scoring
from pipeline.reference.drift import choose_sample, keys_digest, transformers_logps
from pipeline.upkeep import drift_check
from pipeline.upkeep.drift_check import check_reference_drift
from pipeline.workspace import journal_folder
from tests import ROOT
from tests.project import Project
from tests.scoring_project import open_responses
from tests.tiny import plain_logps, shift_row, write_model, write_pairs, write_reference_cache


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads on rows this small only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Pairs, model, and a reference cache of the model's own float32 numbers."""
    root = tmp_path_factory.mktemp("sound")
    write_model(root / "model")
    write_reference_cache(root / "logps", write_pairs(root / "pairs", 5), root / "model")
    return root


class DriftProject(Project):
    def __init__(self, root):
        super().__init__(root)
        self.responses = read_responses(self.pairs).sort("response_key")
        self.keys = self.responses["response_key"].to_list()

    def check(self, **changes):
        options = {"trainer_dtype": "float32", "sample": None, "tolerance": 0.25, "rescore": False}
        options |= {"pairs": self.pairs, "model": self.model, "trust_remote_code": False}
        return check_reference_drift(self.out, **options | changes)

    def score(self):
        """The score stage, whose engine must not be needed."""
        return scoring.score_responses(
            pairs=self.pairs,
            model=self.model,
            out=self.out,
            metrics=self.metrics,
            params=ScoreParams(drift_sample=4),
            trainer_dtype="float32",
        )

    def cached(self, key):
        return open_reference(self.out, expect=None).rows([key])["token_logps"][0].to_list()

    def true(self, key):
        prompt, response = self.responses.row(self.keys.index(key), named=True)["prompt_ids"], self.response(key)
        return plain_logps(self.model, prompt, response)

    def response(self, key):
        return self.responses.row(self.keys.index(key), named=True)["response_ids"]

    @property
    def reference_id(self):
        return open_reference(self.out, expect=None).identity.reference_id


@pytest.fixture
def project(sound, tmp_path, monkeypatch):
    monkeypatch.setenv("REFCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(supervision, "EngineProcess", lambda *args, **kwargs: pytest.fail("an engine was started"))
    shutil.copytree(sound, tmp_path / "project")
    return DriftProject(tmp_path / "project")


def test_a_sound_cache_has_no_flagged_row_and_is_not_touched(project):
    before = project.contents()
    found = project.check()
    assert found["responses"] == len(project.keys) == 15 and found["flagged_rows"] == 0 and found["flagged"] == []
    assert found["tokens"] == project.responses["response_ids"].list.len().sum()
    assert found["per_token"]["max"] < 1e-4 and found["typical_margin"] > 1
    assert found["unchecked"] == 0 and found["rescored"] is None
    assert project.contents() == before


def test_every_altered_row_is_flagged_with_its_drift_and_the_pairs_that_use_it(project):
    off = {project.keys[3]: 1.0, project.keys[12]: 2.5}
    for key, nats in off.items():
        shift_row(project.out, key, nats)
    found = project.check()
    assert found["flagged_rows"] == 2
    assert [row["response_key"] for row in found["flagged"]] == [project.keys[12].hex(), project.keys[3].hex()]
    pairs = read_pairs(project.pairs)
    for row, nats in zip(found["flagged"], (2.5, 1.0), strict=True):
        key = bytes.fromhex(row["response_key"])
        users = pairs.filter((pl.col("chosen_key") == pl.lit(key)) | (pl.col("rejected_key") == pl.lit(key)))
        assert row["drift"] == pytest.approx(nats, abs=1e-4) and row["n_tokens"] == len(project.response(key))
        assert row["sources"] == list(dict.fromkeys(users["source"])) and row["sources"]
    assert found["per_sequence"]["max"] == found["per_token"]["max"] == pytest.approx(2.5, abs=1e-4)
    assert project.check(tolerance=1.5)["flagged_rows"] == 1


def test_a_sample_sees_only_its_own_rows(project):
    responses = open_responses(project.pairs, project.root / "scratch")
    sampled = choose_sample(responses, 4)["response_key"].to_list()
    shift_row(project.out, next(key for key in project.keys if key not in sampled), 1.0)
    assert project.check(sample=4)["flagged_rows"] == 0
    shift_row(project.out, sampled[1], 1.0)
    found = project.check(sample=4)
    assert found["responses"] == 4 and [row["response_key"] for row in found["flagged"]] == [sampled[1].hex()]


def test_chunks_change_nothing(project, monkeypatch):
    shift_row(project.out, project.keys[7], 1.0)
    whole = project.check()
    monkeypatch.setattr(drift_check, "CHUNK_ROWS", 5)
    assert project.check() == whole


@pytest.mark.slow
def test_rescoring_replaces_exactly_the_flagged_rows_with_transformers_float32_values(project):
    before = open_reference(project.out, expect=None).scan().collect()
    for key in project.keys[4:7]:
        shift_row(project.out, key, 1.0)
    found = project.check(rescore=True)
    assert found["flagged_rows"] == 3 and found["rescored"] == {"rows": 3, "kept": 0, "still_flagged": 0}
    assert verify(project.out) == []
    after = open_reference(project.out, expect=None).scan().collect()
    others = ~before["response_key"].is_in(project.keys[4:7])
    assert after.filter(others).equals(before.filter(others))
    for key in project.keys[4:7]:
        assert project.cached(key) == pytest.approx(project.true(key), abs=1e-5)
    stored = json.loads((project.out / "drift.json").read_text())
    assert stored["rescored"] == {"rows": 3, "keys": keys_digest(project.keys[4:7])}
    assert stored["flagged"] == 0 and stored["per_sequence"]["max"] < 1e-4
    again = project.check(rescore=True)
    assert again["flagged_rows"] == 0 and again["rescored"] == {"rows": 0, "kept": 0, "still_flagged": 0}
    assert again["drift"]["rescored"] == stored["rescored"]


@pytest.mark.slow
def test_rescored_rows_outlive_the_next_score_although_the_engines_are_journalled(project):
    key = project.keys[5]
    shift_row(project.out, key, 1.0)
    with Journal(journal_folder() / project.reference_id) as journal:
        journal.append(open_reference(project.out, expect=None).scan().collect().to_arrow())
    project.check(rescore=True)
    files = project.contents()
    summary = project.score()
    assert summary["rows_scored"] == 0 and summary["drift"]["rescored"]["rows"] == 1
    assert project.cached(key) == pytest.approx(project.true(key), abs=1e-5)
    assert {name: files[name] for name in files if name != "drift.json"} == {
        name: content for name, content in project.contents().items() if name != "drift.json"
    }


@pytest.mark.slow
def test_rescored_rows_travel_with_the_publication_to_a_clone_that_has_the_engines_rows(project, monkeypatch):
    key = project.keys[5]
    shift_row(project.out, key, 1.0)
    engines = open_reference(project.out, expect=None).scan().collect().to_arrow()
    project.check(rescore=True)
    project.score()  # so that nothing but the place differs from here on
    before = project.contents()
    for home, rows in (("clone", engines), ("fresh-clone", None)):
        monkeypatch.setenv("REFCACHE_HOME", str(project.root / home))
        if rows is not None:
            with Journal(journal_folder() / project.reference_id) as journal:
                journal.append(rows)
        assert project.score()["rows_scored"] == 0 and project.contents() == before


KILLED = """
import os, signal, sys
from pathlib import Path
from cache import Journal
from pipeline.upkeep import drift_check

append, drift_check.JOURNAL_ROWS = Journal.append, 1

def append_then_die(journal, rows):
    append(journal, rows)
    os.kill(os.getpid(), signal.SIGKILL)

Journal.append = append_then_die
path, pairs, model = map(Path, sys.argv[1:])
drift_check.check_reference_drift(
    path, pairs=pairs, model=model, trainer_dtype="float32", sample=None, tolerance=0.25, rescore=True,
    trust_remote_code=False,
)
"""


@pytest.mark.slow
def test_a_killed_rescoring_keeps_what_it_journalled_and_publishes_it_next_time(project):
    off = project.keys[4:7]
    for key in off:
        shift_row(project.out, key, 1.0)
    before = project.contents()
    arguments = [str(path) for path in (project.out, project.pairs, project.model)]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL and project.contents() == before
    found = project.check(rescore=True)
    assert found["rescored"] == {"rows": 2, "kept": 1, "still_flagged": 0}
    for key in off:
        assert project.cached(key) == pytest.approx(project.true(key), abs=1e-5)


@pytest.mark.slow
def test_rows_whose_float32_values_differ_too_are_counted_and_not_scored_for_ever(project):
    """Against a trainer in bf16 the drift is the trainer's own rounding; rescoring can't take it away."""
    found = project.check(trainer_dtype="bfloat16", tolerance=1e-3, rescore=True)
    rows = found["flagged_rows"]
    assert rows > 8 and found["rescored"] == {"rows": rows, "kept": 0, "still_flagged": rows}
    again = project.check(trainer_dtype="bfloat16", tolerance=1e-3, rescore=True)
    assert again["rescored"] == {"rows": 0, "kept": rows, "still_flagged": rows}


def test_rescoring_waits_for_no_writer_and_disturbs_none(project):
    shift_row(project.out, project.keys[0], 1.0)
    before = project.contents()
    with Journal(journal_folder() / project.reference_id):
        assert project.check()["flagged_rows"] == 1  # looking is allowed
        with pytest.raises(CacheLocked, match="pid"):
            project.check(rescore=True)
    assert project.contents() == before


def test_damage_is_never_published_under_a_new_checksum(project):
    shift_row(project.out, project.keys[0], 1.0)
    shard = next(project.out.glob("*.parquet"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    before = project.contents()
    with pytest.raises(CacheCorrupt, match="--repair"):
        project.check(rescore=True)
    assert project.contents() == before


def test_a_model_whose_forward_is_not_finite_is_a_failed_run_and_no_small_drift(project):
    model = AutoModelForCausalLM.from_pretrained(project.model)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(project.root / "broken")
    rows = [(np.array([3, 4]), np.array([5]))]
    with pytest.raises(RunFailed, match=f"not finite, for response {response_key([3, 4], [5]).hex()}"):
        transformers_logps(project.root / "broken", rows, "float32")


def test_other_weights_and_missing_rows_are_refused_before_any_forward(project, monkeypatch):
    monkeypatch.setattr(drift_check, "TrainerForward", lambda *a, **k: pytest.fail("the model was loaded"))
    with pytest.raises(CacheMismatch, match="weights"):
        project.check(model=write_model(project.root / "other", seed=1))
    with pytest.raises(CacheIncomplete, match="dvc repro score"):
        project.check(pairs=write_pairs(project.root / "grown", 3, seed=3))
