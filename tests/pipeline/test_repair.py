"""`refcache verify --repair` on a whole project: what is bad moves aside, and only its rows are scored again."""

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from cache import Journal, open_reference, shards, verify
from pipeline import scoring
from pipeline.weights import reference_identity
from stages.__main__ import main
from tests.pipeline.tiny_reference import quick_engine, write_model
from tests.tiny import write_pairs, write_reference_cache

PARAMS = Path(__file__).parents[2] / "params.yaml"


class Project:
    def __init__(self, root: Path) -> None:
        self.root, self.pairs, self.model, self.out = root, root / "pairs", root / "model", root / "logps"
        self.home, self.metrics = root / "home", root / "metrics.json"
        self.identity = reference_identity(self.model, dtype="float32", quantization=None)

    def run(self, command, *arguments, **options):
        paths = {"--pairs": self.pairs, "--model": self.model, "--params": PARAMS} | options
        words = [command, *arguments, *(word for option in paths.items() for word in option)]
        return CliRunner(env={"REFCACHE_HOME": str(self.home)}).invoke(main, list(map(str, words)))

    def repair(self, **options):
        return self.run("verify", self.out, "--repair", **{"--metrics": self.metrics}, **options)

    def contents(self):
        return {path.name: path.read_bytes() for path in self.out.iterdir()}

    def shards(self):
        return sorted(self.out.glob("*.parquet"))

    def fill_journal(self):
        with Journal(self.home / "journal" / self.identity.reference_id) as journal:
            journal.append(open_reference(self.out, expect=self.identity).scan().collect().to_arrow())

    def damage(self):
        """A flipped byte, a missing shard and a stray one; returns the keys of the rows that were hit."""
        flipped, missing, *_ = self.shards()
        lost = set(pl.read_parquet([flipped, missing])["response_key"])
        content = bytearray(flipped.read_bytes())
        content[len(content) // 2] ^= 1
        flipped.write_bytes(content)
        missing.rename(self.out / "mine.parquet")
        return lost


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A project whose reference cache transformers filled, in several shards."""
    root = tmp_path_factory.mktemp("repair")
    write_model(root / "model")
    write_pairs(root / "pairs", 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_ROWS", 6)
        write_reference_cache(root / "logps", root / "pairs", root / "model")
        yield root


@pytest.fixture
def project(sound, tmp_path):
    shutil.copytree(sound, tmp_path / "project")
    return Project(tmp_path / "project")


@pytest.fixture
def no_engine(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("an engine was started")

    monkeypatch.setattr(scoring, "EngineProcess", refuse)


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
