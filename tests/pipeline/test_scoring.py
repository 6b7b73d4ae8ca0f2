"""Filling the reference cache with the real engine: what is scored, what is reused, and what a kill leaves behind."""

import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from cache import Journal, open_reference, prompt_key, response_key, verify
from pipeline import scoring
from pipeline.drift import summary as drift_summary
from pipeline.engine_process import EngineProcess
from pipeline.errors import RequestError, RunFailed
from pipeline.params import ScoreParams
from pipeline.prepared_data import PAIRS_SCHEMA, RESPONSES_SCHEMA, write_table
from pipeline.scoring import score_responses
from pipeline.weights import reference_identity
from tests.pipeline.tiny_reference import adversarial_rows, quick_engine, transformers_token_logps, write_model

ROOT = Path(__file__).parents[2]
PARAMS = ScoreParams(enforce_eager=True, rows_per_call=6, drift_sample=8)


def write_prepared(folder, rows):
    """Prepared pairs whose responses are `rows`; a pair for every two responses of a prompt that follow each other."""
    responses, pairs = [], []
    for index, (prompt, response) in enumerate(rows):
        responses.append(
            {
                "response_key": response_key(prompt, response),
                "prompt_key": prompt_key(prompt),
                "split": "train" if index % 3 else "test",
                "prompt_ids": prompt,
                "response_ids": response,
                "truncated": False,
                "prompt_text": "",
                "response_text": "",
                "reward": None,
            }
        )
    for chosen, rejected in pairwise(responses):
        if chosen["prompt_key"] == rejected["prompt_key"]:
            pairs.append(
                {name: chosen[name] for name in ("split", "prompt_key", "prompt_text")}
                | {"chosen_key": chosen["response_key"], "rejected_key": rejected["response_key"]}
                | {"pair_id": len(pairs), "category": None, "chosen_text": "", "rejected_text": ""}
                | {"chosen_reward": None, "rejected_reward": None, "source": f"rows:{len(pairs)}"}
            )
    write_table(pa.Table.from_pylist(pairs, PAIRS_SCHEMA), folder / "pairs.parquet", PAIRS_SCHEMA)
    write_table(pa.Table.from_pylist(responses, RESPONSES_SCHEMA), folder / "responses.parquet", RESPONSES_SCHEMA)
    return folder


class Project:
    """Pairs, a model, and a place for the journal and the reference cache."""

    def __init__(self, root, model, rows):
        self.root, self.model, self.rows = root, model, rows
        self.pairs = write_prepared(root / "pairs", rows)
        self.out, self.metrics, self.home = root / "logps", root / "metrics.json", root / "home"

    def score(self, pairs=None, **changes):
        options = {"params": PARAMS, "trainer_dtype": "float32"} | changes
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("REFCACHE_HOME", str(self.home))
            return score_responses(
                pairs=pairs or self.pairs, model=self.model, out=self.out, metrics=self.metrics, **options
            )

    def journalled(self):
        identity = reference_identity(self.model, dtype=PARAMS.dtype, quantization=PARAMS.quantization)
        with Journal(self.home / "journal" / identity.reference_id) as journal:
            return journal.keys()

    def published(self):
        return {path.name: path.read_bytes() for path in self.out.iterdir()}


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_engine():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model):
    """A run that nothing interrupted."""
    place = Project(tmp_path_factory.mktemp("finished"), model, adversarial_rows())
    place.summary = place.score()
    return place


@pytest.fixture
def place(tmp_path, model):
    return Project(tmp_path, model, adversarial_rows())


@pytest.fixture
def no_engine(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("an engine was started")

    monkeypatch.setattr(scoring, "EngineProcess", refuse)


# without an engine ----------------------------------------------------------------------------------------------------


def test_a_row_that_cannot_be_scored_is_refused_before_the_model_loads(place, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(EngineProcess, "load", refuse)
    bad = (np.array([3, 64], np.int32), np.array([5], np.int32))
    with pytest.raises(RequestError, match=f"{response_key(*bad).hex()} has token id 64"):
        place.score(write_prepared(place.root / "bad", [*place.rows, bad]))
    assert not place.out.exists() and not place.metrics.exists()


def test_no_responses_is_a_wrong_request(place, no_engine):
    with pytest.raises(RequestError, match="no responses"):
        place.score(write_prepared(place.root / "none", []))


# with the real one ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_cache_holds_transformers_numbers_for_every_response(finished):
    reference = open_reference(
        finished.out, expect=reference_identity(finished.model, dtype="float32", quantization=None)
    )
    assert reference.n_rows == finished.summary["responses"] == finished.summary["rows_scored"] == len(finished.rows)
    expected = transformers_token_logps(finished.model, finished.rows)
    found = reference.rows([response_key(*row) for row in finished.rows])
    for (prompt, response), whole, row in zip(finished.rows, expected, found.iter_rows(named=True), strict=True):
        own = whole[len(prompt) - 1 :]
        np.testing.assert_allclose(row["token_logps"], own, atol=1e-4)
        assert row["sum_logp"] == pytest.approx(own.astype(np.float64).sum(), abs=1e-3)
        assert row["token_ids"] == response.tolist() and row["n_prompt_tokens"] == len(prompt)
        assert row["prompt_key"] == prompt_key(prompt)
    assert verify(finished.out) == []


@pytest.mark.slow
def test_metrics_and_drift_describe_the_run(finished):
    assert json.loads(finished.metrics.read_text()) == finished.summary
    stored = json.loads((finished.out / "drift.json").read_text())
    assert drift_summary(stored) == finished.summary["drift"]
    assert [row["drift"] for row in stored["sequences"]] == sorted(
        (r["drift"] for r in stored["sequences"]), reverse=True
    )
    tokens = sum(len(prompt) + len(response) for prompt, response in finished.rows)
    assert finished.summary["tokens_scored"] == tokens and finished.summary["tokens_per_second"] > 0
    assert finished.summary["response_tokens"] == sum(len(response) for _, response in finished.rows)
    drift = finished.summary["drift"]
    assert drift["trainer_dtype"] == "float32" and drift["responses"] == 8
    assert 0 <= drift["per_token"]["p99"] <= drift["per_token"]["max"] < 1e-4
    assert drift["typical_margin"] > 1 and drift["flagged"] == 0 and drift["rescored"]["rows"] == 0


@pytest.mark.slow
def test_a_second_run_scores_nothing_and_starts_no_engine(finished, no_engine):
    before = finished.published()
    summary = finished.score()
    assert summary["rows_scored"] == 0 and summary["rows_reused"] == len(finished.rows)
    assert finished.published() == before


@pytest.mark.slow
def test_published_rows_are_reused_without_a_journal(finished, place, no_engine):
    finished_rows = finished.published()
    place.out.mkdir()
    for name, content in finished_rows.items():
        (place.out / name).write_bytes(content)
    assert place.score()["rows_scored"] == 0  # its own home has no journal: a fresh clone after `dvc pull`
    assert place.published() == finished_rows


@pytest.mark.slow
def test_fewer_pairs_publish_fewer_rows_and_their_return_costs_nothing(finished, no_engine):
    everything = finished.published()
    assert finished.score(write_prepared(finished.root / "fewer", finished.rows[:-3]))["rows_scored"] == 0
    assert open_reference(finished.out, expect=None).n_rows == len(finished.rows) - 3
    assert finished.score()["rows_scored"] == 0
    assert finished.published() == everything


@pytest.mark.slow
def test_a_damaged_cache_is_published_anew_from_the_journal(finished, no_engine):
    everything = finished.published()
    shard = next(path for path in finished.out.iterdir() if path.suffix == ".parquet")
    shard.write_bytes(shard.read_bytes()[:-100])
    assert finished.score()["rows_scored"] == 0
    assert finished.published() == everything


@pytest.mark.slow
def test_a_damaged_cache_without_a_journal_lends_no_rows(finished, place, monkeypatch, capsys):
    place.out.mkdir()
    for name, content in finished.published().items():
        flipped = bytearray(content)
        if name.endswith(".parquet"):
            flipped[len(flipped) // 2] ^= 1
        (place.out / name).write_bytes(flipped)
    asked = []
    monkeypatch.setattr(scoring, "_score_missing", lambda missing, *rest: asked.append(len(missing)) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        place.score()
    assert asked == [len(place.rows)]
    assert "scored again" in capsys.readouterr().err


@pytest.mark.slow
def test_only_new_responses_are_scored(finished, monkeypatch):
    prompt, _ = finished.rows[0]
    new = [(prompt, np.array([40, 41, 42], np.int32)), (np.array([8, 9], np.int32), np.array([2], np.int32))]
    grown = write_prepared(finished.root / "grown", [*finished.rows, *new])
    seen = []
    score = EngineProcess.score
    monkeypatch.setattr(
        EngineProcess, "score", lambda self, rows, advance: seen.extend(rows) or score(self, rows, advance)
    )
    summary = finished.score(grown)
    assert summary["rows_scored"] == 2 and summary["rows_reused"] == len(finished.rows)
    assert {response_key(*row) for row in seen} == {response_key(*row) for row in new}
    assert open_reference(finished.out, expect=None).n_rows == len(finished.rows) + 2


STAGE = """
import os, signal, sys
from pathlib import Path
from cache import Journal
from pipeline.params import ScoreParams
from pipeline.scoring import score_responses

append, calls_left = Journal.append, int(sys.argv[5])

def append_then_die(journal, rows):
    global calls_left
    append(journal, rows)
    calls_left -= 1
    if calls_left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

Journal.append = append_then_die
pairs, model, out, metrics = map(Path, sys.argv[1:5])
params = ScoreParams.model_validate_json(sys.argv[6])
score_responses(pairs=pairs, model=model, out=out, metrics=metrics, params=params, trainer_dtype="float32")
"""


@pytest.mark.slow
def test_a_killed_stage_loses_nothing_and_ends_in_the_same_bytes(finished, place, monkeypatch):
    arguments = [*map(str, (place.pairs, place.model, place.out, place.metrics)), "2", PARAMS.model_dump_json()]
    environment = os.environ | {"REFCACHE_HOME": str(place.home), "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", STAGE, *arguments], env=environment, cwd=place.root)
    assert killed.returncode == -signal.SIGKILL
    kept = place.journalled()
    assert 0 < len(kept) < len(place.rows)
    assert not place.out.exists()  # nothing half-finished is visible

    seen = []
    score = EngineProcess.score
    monkeypatch.setattr(
        EngineProcess, "score", lambda self, rows, advance: seen.extend(rows) or score(self, rows, advance)
    )
    summary = place.score()
    assert summary["rows_scored"] == len(place.rows) - len(kept) == len(seen)
    assert not {response_key(*row) for row in seen} & kept
    assert finished.score()["rows_scored"] == 0  # in case another test left it grown or shrunk
    assert place.published() == finished.published()


@pytest.mark.slow
def test_a_killed_engine_is_a_failed_run_that_keeps_its_rows(place, monkeypatch):
    score, calls = EngineProcess.score, []

    def die_in_the_third(self, rows, advance):
        calls.append(rows)
        if len(calls) == 3:
            os.kill(self.pid, signal.SIGKILL)
        return score(self, rows, advance)

    monkeypatch.setattr(EngineProcess, "score", die_in_the_third)
    with pytest.raises(RunFailed, match="killed by signal 9") as failed:
        place.score()
    assert str(place.home / "logs" / "score.log") in str(failed.value)
    assert place.journalled() == {response_key(*row) for call in calls[:2] for row in call}
    assert not place.out.exists()


@pytest.mark.slow
def test_train_and_test_responses_are_both_scored(finished):
    responses = pl.read_parquet(finished.pairs / "responses.parquet")
    assert set(responses["split"]) == {"train", "test"}
    assert open_reference(finished.out, expect=None).missing(responses["response_key"]) == []
