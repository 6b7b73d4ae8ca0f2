"""`refcache verify --repair` on a whole project: what is bad moves aside, and only its rows are scored again."""

import json
import shutil

import numpy as np
import polars as pl
import pytest

from cache import Journal, open_reference, publish_reference, shards, verify
from pipeline.engine import supervision
from tests.project import ScoredProject, write_project
from tests.tiny import write_model
from tests.tiny_reference import quick_engine


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A project whose reference cache transformers filled, in several shards."""
    root = write_project(tmp_path_factory.mktemp("repair"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_ROWS", 6)
        yield root


@pytest.fixture
def project(sound, tmp_path):
    shutil.copytree(sound, tmp_path / "project")
    return ScoredProject(tmp_path / "project")


@pytest.fixture
def no_engine(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("an engine was started")

    monkeypatch.setattr(supervision, "EngineProcess", refuse)


def parquet(contents):
    return {name: content for name, content in contents.items() if name.endswith((".parquet", "manifest.json"))}


def test_a_sound_cache_is_left_as_it_is(project, no_engine):
    before = project.contents()
    result = project.repair()
    assert (result.exit_code, project.contents()) == (0, before)
    assert result.output == f"{project.out}: sound\n" and not (project.home / "damaged").exists()


def test_rows_that_are_in_the_journal_are_not_scored_again(project, no_engine):
    project.fill_journal()
    before = project.contents()
    project.damage()
    hit = project.contents()
    result = project.repair()
    assert result.exit_code == 0, result.output
    assert "moved 2 files to" in result.output and "0 rows scored again, 24 reused" in result.output
    assert parquet(project.contents()) == parquet(before) and verify(project.out) == []
    (aside,) = (project.home / "damaged").iterdir()
    assert aside.name == f"{project.identity.reference_id}-1"
    kept = {path.name: path.read_bytes() for path in aside.iterdir()}
    assert kept == {name: hit[name] for name in kept} and {"mine.parquet", "manifest.json"} < set(kept)


@pytest.mark.parametrize("damage", ["{", None])
def test_a_wrong_manifest_is_rewritten_from_the_shards(project, no_engine, damage):
    before = project.contents()
    wrong = damage or json.dumps(json.loads(before["manifest.json"]) | {"n_rows": 1})
    (project.out / "manifest.json").write_text(wrong)
    result = project.repair()
    assert result.exit_code == 0 and "0 rows scored again, 24 reused" in result.output
    assert parquet(project.contents()) == parquet(before)


def test_another_model_is_refused_before_anything_moves(project, tmp_path):
    project.damage()
    before = project.contents()
    result = project.repair(**{"--model": write_model(tmp_path / "other", seed=1)})
    assert result.exit_code == 2 and "weights: found" in result.stderr
    assert project.contents() == before and not (project.home / "damaged").exists()


def test_a_running_scorer_is_not_disturbed(project, no_engine):
    project.fill_journal()
    project.damage()
    before = project.contents()
    with Journal(project.home / "journal" / project.identity.reference_id):
        result = project.repair()
    assert result.exit_code == 1 and "is being written by pid" in result.stderr
    assert project.contents() == before


@pytest.mark.slow
def test_verify_with_drift_names_rows_above_the_tolerance_and_repair_rescores_them(project, no_engine):
    assert "0 rows above 0.25 nats" in project.command("verify", project.out, "--drift", "--sample", 5).output
    rows = open_reference(project.out, expect=None).scan().collect()
    wrong = rows.with_columns(pl.col("token_logps") - (pl.int_range(pl.len()) == 3).cast(pl.Float32))
    wrong = wrong.with_columns(
        pl.col("token_logps").list.eval(pl.element().cast(pl.Float64)).list.sum().alias("sum_logp")
    )
    publish_reference(project.out, wrong.to_arrow(), project.identity)
    found = project.command("verify", project.out, "--drift")
    assert found.exit_code == 1 and "1 row above 0.25 nats (train.drift_tolerance)" in found.stderr
    assert f"  {rows['response_key'][3].hex()}: " in found.stdout and "tiny.jsonl:" in found.stdout
    mended = project.command("verify", project.out, "--drift", "--repair", **{"--metrics": project.metrics})
    assert mended.exit_code == 0 and "1 scored anew with transformers in float32" in mended.output
    assert "0 rows above" in project.command("verify", project.out, "--drift").output


@pytest.mark.slow
def test_only_the_rows_of_damaged_shards_are_scored_again(project):
    before = open_reference(project.out, expect=None).scan().collect()
    lost = project.damage()
    with quick_engine():
        result = project.repair()
    assert result.exit_code == 0, result.output
    assert f"{len(lost)} rows scored again, {24 - len(lost)} reused" in result.output
    with Journal(project.home / "journal" / project.identity.reference_id) as journal:
        assert journal.keys() == lost
    after = open_reference(project.out, expect=project.identity).scan().collect()
    was_hit = pl.col("response_key").is_in(list(lost))
    assert after.filter(~was_hit).equals(before.filter(~was_hit))
    for old, new in zip(before.filter(was_hit)["token_logps"], after.filter(was_hit)["token_logps"], strict=True):
        np.testing.assert_allclose(new, old, atol=1e-4)
