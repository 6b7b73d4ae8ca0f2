"""Filling the reference cache with the real engine: what is scored, what is reused, and what a kill leaves behind."""

import json
import signal

import numpy as np
import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM

from cache import open_reference, open_sketches, prompt_key, response_key, verify
from pipeline.data.tables import read_responses
from pipeline.engine import supervision
from pipeline.engine.process import EngineProcess
from pipeline.errors import RequestError
from pipeline.reference import scoring
from pipeline.reference.drift import summary as drift_summary
from pipeline.reference.identity import reference_identity
from tests.engine_nursery import engines
from tests.integration import kills
from tests.pipeline.sketches.slow_sketches import slow_sketch
from tests.pipeline.sketches.test_head import head_gradients
from tests.scoring_project import SKETCH, ScoringProject, write_prepared
from tests.tiny import write_model
from tests.tiny_reference import adversarial_rows, quick_engine, transformers_token_logps


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
    place = ScoringProject(tmp_path_factory.mktemp("finished"), model, adversarial_rows())
    place.summary = place.score()
    return place


@pytest.fixture
def place(tmp_path, model):
    return ScoringProject(tmp_path, model, adversarial_rows())


@pytest.fixture
def no_engine(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("an engine was started")

    monkeypatch.setattr(supervision, "EngineProcess", refuse)


# without an engine ----------------------------------------------------------------------------------------------------


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
    before = finished.contents()
    summary = finished.score()
    assert summary["rows_scored"] == 0 and summary["rows_reused"] == len(finished.rows)
    assert finished.contents() == before


@pytest.mark.slow
def test_published_rows_are_reused_without_a_journal(finished, place, no_engine):
    finished_rows = finished.contents()
    place.out.mkdir()
    for name, content in finished_rows.items():
        (place.out / name).write_bytes(content)
    assert place.score()["rows_scored"] == 0  # its own home has no journal: a fresh clone after `dvc pull`
    assert place.contents() == finished_rows


@pytest.mark.slow
def test_fewer_pairs_publish_fewer_rows_and_their_return_costs_nothing(finished, no_engine):
    everything = finished.contents()
    assert finished.score(write_prepared(finished.root / "fewer", finished.rows[:-3]))["rows_scored"] == 0
    assert open_reference(finished.out, expect=None).n_rows == len(finished.rows) - 3
    assert finished.score()["rows_scored"] == 0
    assert finished.contents() == everything


@pytest.mark.slow
def test_a_damaged_cache_is_published_anew_from_the_journal(finished, no_engine):
    everything = finished.contents()
    shard = next(path for path in finished.out.iterdir() if path.suffix == ".parquet")
    shard.write_bytes(shard.read_bytes()[:-100])
    assert finished.score()["rows_scored"] == 0
    assert finished.contents() == everything


@pytest.mark.slow
def test_a_damaged_cache_without_a_journal_lends_no_rows(finished, place, monkeypatch, capsys):
    place.out.mkdir()
    for name, content in finished.contents().items():
        flipped = bytearray(content)
        if name.endswith(".parquet"):
            flipped[len(flipped) // 2] ^= 1
        (place.out / name).write_bytes(flipped)
    asked = []
    monkeypatch.setattr(scoring, "_score_missing", lambda missing, *_: asked.append(sum(map(len, missing))) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        place.score()
    assert asked == [len(place.rows)]
    assert "scored again" in capsys.readouterr().err


def train_keys(pairs):
    return set(read_responses(pairs).filter(pl.col("split") == "train")["response_key"])


def require_head_parts(place, stored, rows):
    """Those of `rows` that are stored are sketches of the head's part of the tied weight's gradient."""
    model = AutoModelForCausalLM.from_pretrained(place.model, dtype=torch.float32).eval()
    kept = stored.keys()
    for prompt, response in rows:
        key = response_key(prompt, response)
        if key not in kept:
            continue
        row = stored.rows([key]).row(0, named=True)
        (gradient,) = head_gradients(model, prompt.tolist(), response.tolist()).values()
        wanted = slow_sketch("model.embed_tokens.weight", gradient, SKETCH.k, seed=0, purpose="sketch")
        found = np.array(row["head_part"], np.float64) * row["head_part_scale"]
        assert np.linalg.norm(found - wanted) < 1e-3 * np.linalg.norm(wanted)
        assert row["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-3)


@pytest.fixture(scope="module")
def sketched(finished):
    """By an engine that the sketch stage started, since score did not know of sketches."""
    return finished.sketch()


@pytest.mark.slow
def test_the_sketch_stage_has_an_engine_of_its_own_sketch_what_score_did_not(finished, sketched, no_engine, capsys):
    train = train_keys(finished.pairs)
    assert (sketched["source"], sketched["rows_sketched"], sketched["responses"]) == ("engine", len(train), len(train))
    stored = open_sketches(finished.sketches, expect=None)
    assert stored.keys() == train and stored.identity.widths == {"head_part": SKETCH.k} and verify(stored.path) == []
    assert stored.identity.source == "engine" and "embed_tokens" in stored.identity.trainable
    require_head_parts(finished, stored, finished.rows[::7])
    again = finished.sketch()
    assert again["rows_sketched"] == 0 and "the head's part of the gradient only" in capsys.readouterr().err


@pytest.mark.slow
def test_only_new_responses_are_scored(finished, sketched, monkeypatch):
    prompt, _ = finished.rows[0]
    new = [(prompt, np.array([40, 41, 42], np.int32)), (np.array([8, 9], np.int32), np.array([2], np.int32))]
    grown = write_prepared(finished.root / "grown", [*finished.rows, *new])
    seen = []
    score = EngineProcess.score
    monkeypatch.setattr(
        EngineProcess,
        "score",
        lambda self, rows, *rest, **named: seen.extend(rows) or score(self, rows, *rest, **named),
    )
    summary = finished.score(grown, sketch=SKETCH)
    assert summary["rows_scored"] == 2 and summary["rows_reused"] == len(finished.rows)
    assert {response_key(*row) for row in seen} == {response_key(*row) for row in new}
    assert open_reference(finished.out, expect=None).n_rows == len(finished.rows) + 2
    # Those that train got their head sketch on the way; the sketch stage starts no engine for them.
    assert summary["rows_sketched"] == len(train_keys(grown) - train_keys(finished.pairs)) > 0
    monkeypatch.setattr(supervision, "EngineProcess", None)
    assert finished.sketch(grown)["rows_sketched"] == 0
    stored = open_sketches(finished.sketches, expect=None)
    assert stored.keys() == train_keys(grown)
    require_head_parts(finished, stored, new)


@pytest.mark.slow
def test_kills_and_a_hang_of_stage_and_engine_lose_nothing_and_a_poisonous_row_is_set_aside(finished, place):
    """What an undisturbed end looks like after kills is in tests/integration/test_kills.py."""
    rows = place.rows
    poison = response_key(*min(rows, key=lambda row: (len(row[0]) + len(row[1]), response_key(*row))))
    with kills.Nursery(engines()) as nursery:
        assert nursery.score(place, kill_after=1)[0] == -signal.SIGKILL  # the engine loads the model meanwhile
        assert nursery.score(place, [("stage_after_append", 2)])[0] == -signal.SIGKILL
        kept = place.journalled()
        assert 0 < len(kept) < len(rows) and poison not in kept
        assert not place.out.exists()  # nothing half-finished is visible

        status, output = nursery.score(place, [("engine_at_row", poison.hex())])
        assert status == 1, output
        assert output.count("killed by signal 9") == 2 and output.count("gave no sign of life for 1 s") == 1
        assert f"Response {poison.hex()} (of no pair) ended three engines" in output
    assert not place.out.exists()
    found, undisturbed = kills.journalled_logps(place.home), kills.journalled_logps(finished.home)
    assert found["response_key"].to_list() == sorted({response_key(*row) for row in rows} - {poison})  # once each
    assert found.equals(undisturbed.join(found, on="response_key", how="semi"))


@pytest.mark.slow
def test_train_and_test_responses_are_both_scored(finished):
    responses = pl.read_parquet(finished.pairs / "responses.parquet")
    assert set(responses["split"]) == {"train", "test"}
    assert open_reference(finished.out, expect=None).missing(responses["response_key"]) == []
