"""gc, why-miss, verify, its repair and inspect on sketches: what they do for log-probs, on a whole tiny project."""

import json
import shutil

import numpy as np
import polars as pl
import pytest

from cache import Journal, SketchIdentity, open_sketches, publish_reference, verify
from cache.sketches import sketch_kind
from pipeline.params import SketchParams
from pipeline.reference.sketching import sketch_responses
from tests.project import PARAMS, Project
from tests.tiny import write_model, write_pairs

SETTINGS = {"mode": "tensorsketch", "k": 32, "audit": 8, "batch_tokens": 64}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Pairs of 8 prompts (18 training responses), a model, and sound sketches of them in several shards."""
    root = tmp_path_factory.mktemp("upkeep")
    write_model(root / "model")
    write_pairs(root / "pairs", 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFCACHE_HOME", str(root / "home"))
        patch.setattr("cache.sketches.SHARD_BYTES", 6 * 108)
        sketch_responses(
            pairs=root / "pairs",
            model=root / "model",
            out=root / "sketches",
            metrics=root / "metrics.json",
            params=SketchParams(**SETTINGS),
            trainable="last_block",
        )
        yield root


class SketchProject(Project):
    def __init__(self, root):
        super().__init__(root, "sketches")
        self.identity = open_sketches(self.out, expect=None).identity
        self.journal = self.home / "sketch-journal" / self.identity.reference_id

    def sketching(self, *words, **changes):
        """A command under the params that `made` sketched with, and `changes` of these."""
        settings = {f"sketch.{name}": value for name, value in SETTINGS.items()} | {"trainable": "last_block"} | changes
        return self.command(*words, *(w for name, value in settings.items() for w in ("--set", f"{name}={value}")))

    def repair(self, **changes):
        return self.sketching("verify", self.out, "--repair", "--metrics", self.metrics, **changes)

    def ask(self, *words, **changes):
        words = words or ("--reference", self.out)
        result = self.sketching("why-miss", "--sketches", "--json", *words, **changes)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    def gc(self, *words):
        return self.run("gc", "--reference", self.root / "logps", "--sketches", self.out, *words)

    def rows(self):
        with Journal(self.journal, self.identity.kind) as journal:
            return pl.concat([pl.DataFrame(table) for table in journal.tables()]).sort("response_key")


@pytest.fixture
def project(made, tmp_path):
    shutil.copytree(made, tmp_path / "project")
    return SketchProject(tmp_path / "project")


# verify ---------------------------------------------------------------------------------------------------------------


def test_verify_reports_each_sound_shard_and_names_the_repair_of_a_damaged_one(project):
    result = project.run("verify", project.out)
    assert result.exit_code == 0 and result.output.count(": sound") == len(list(project.out.glob("*.parquet"))) + 1
    assert "tokens" not in result.output
    project.damage()
    result = project.run("verify", project.out)
    assert result.exit_code == 1 and result.output.count(f"refcache verify {project.out} --repair") == 3
    assert "dvc repro -f sketch" in result.output and "score" not in result.output


def test_repair_sketches_only_what_neither_a_sound_shard_nor_the_journal_has(project):
    before = open_sketches(project.out, expect=None).scan().collect()
    lost = project.damage()
    shutil.rmtree(project.home)
    result = project.repair()
    assert result.exit_code == 0, result.output
    assert 0 < len(lost) < 18 and f"{len(lost)} rows sketched again, {18 - len(lost)} reused" in result.output
    after, again = open_sketches(project.out, expect=None).scan().collect(), pl.col("response_key").is_in(list(lost))
    assert after.filter(~again).equals(before.filter(~again)) and verify(project.out) == []
    # In other batches than before, they may differ by a rounding.
    np.testing.assert_allclose(after.filter(again)["grad_norm"], before.filter(again)["grad_norm"], rtol=1e-5)
    (aside,) = (project.home / "damaged").iterdir()
    assert aside.name == f"{project.identity.reference_id}-1" and (aside / "manifest.json").exists()
    assert project.repair().output == f"{project.out}: sound\n"


def test_a_wrong_manifest_is_rewritten_from_the_shards(project):
    before = project.contents()
    shutil.rmtree(project.home)
    (project.out / "manifest.json").write_text("{")
    assert "dvc repro -f sketch" in project.run("verify", project.out).output
    result = project.repair()
    assert result.exit_code == 0 and "0 rows sketched again, 18 reused" in result.output, result.output
    assert project.contents() == before


@pytest.mark.parametrize(
    ("change", "field"),
    [({"trainable": "head"}, "trainable"), ({"sketch.k": 64}, "k"), ({"sketch.mode": "none"}, "mode")],
)
def test_other_sketches_are_refused_before_anything_moves(project, change, field):
    project.damage()
    before = project.contents()
    result = project.repair(**change)
    assert result.exit_code == 2 and f"  {field}: found" in result.stderr
    assert project.contents() == before and not (project.home / "damaged").exists()


def test_drift_is_of_log_probs_and_refused(project):
    result = project.run("verify", project.out, "--drift", "--params", PARAMS)
    assert result.exit_code == 2 and "holds sketches" in result.stderr


# why-miss -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_published_or_journalled_is_reused_and_asking_changes_nothing(project):
    before = {path: path.stat().st_mtime_ns for path in sorted(project.root.rglob("*"))}
    found = project.ask(**{"sketch.batch_tokens": 9, "score.dtype": "bfloat16"})
    assert (found["responses"], found["reusable"], found["missing"], found["reasons"]) == (18, 18, 0, [])
    assert {path: path.stat().st_mtime_ns for path in sorted(project.root.rglob("*"))} == before
    shutil.rmtree(project.out)
    assert project.ask()["reusable"] == 18
    shutil.rmtree(project.home)
    assert project.ask()["reasons"] == [f"{project.out}: nothing is published there."]


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ({"trainable": "head"}, {"trainable", "groups"}),
        ({"sketch.k": 64}, {"k", "groups"}),
        ({"sketch.seed": 3}, {"seed"}),
        ({"sketch.dtype": "bfloat16"}, {"dtype"}),
        ({"sketch.source": "engine"}, {"trainable", "groups", "source"}),
    ],
)
def test_a_miss_names_the_fields_with_both_values(project, change, fields):
    found = project.ask(**change)
    assert found["missing"] == 18 and set(found["published"]["differs"]) == fields
    assert set(found["journals"][0]["differs"]) == fields and found["journals"][0]["rows_for_these_pairs"] == 18
    assert all(f"{field} is " in found["reasons"][0] for field in fields)
    assert "18 of these responses under another reference" in found["reasons"][1]


def test_new_responses_are_counted_and_the_sentence_speaks_of_sketching(project):
    shutil.rmtree(project.home)
    rows = open_sketches(project.out, expect=None)
    kept = pl.concat([pl.DataFrame(table) for table in rows.tables(rows.identity.kind.schema.names)]).head(15)
    publish_reference(project.out, kept.to_arrow().cast(rows.identity.kind.schema), project.identity)
    result = project.sketching("why-miss", "--sketches", "--reference", project.out)
    assert "15 of 18 responses would be reused, 3 sketched" in result.output


def test_mode_none_is_told_as_such_on_either_side(project):
    asked = project.sketching("why-miss", "--sketches", "--reference", project.out, **{"sketch.mode": "none"})
    assert asked.exit_code == 0 and "sketch.mode is none" in asked.output
    shutil.rmtree(project.home)
    none = SketchIdentity(mode="none")
    publish_reference(project.out, none.kind.schema.empty_table(), none)
    assert "no sketches were asked for" in project.ask()["reasons"][0]


def test_sketches_are_not_taken_for_log_probs(project):
    result = project.sketching("why-miss", "--reference", project.out)
    assert result.exit_code == 2 and "holds sketches, expected logps" in result.stderr and "--sketches" in result.stderr


# gc -------------------------------------------------------------------------------------------------------------------


def test_journalled_rows_of_current_pairs_stay_bit_for_bit_and_others_go(project, tmp_path):
    fewer, before, published = write_pairs(tmp_path / "fewer", 5), project.rows(), project.contents()
    needed = pl.read_parquet(fewer / "responses.parquet")["response_key"].to_list()
    assert 0 < before["response_key"].is_in(needed).sum() < 18
    planned = project.gc("--pairs", fewer, "--dry-run").output
    assert project.rows().equals(before)
    result = project.gc("--pairs", fewer)
    assert result.exit_code == 0, result.output
    assert project.rows().equals(before.filter(pl.col("response_key").is_in(needed)))
    assert f"{project.journal}: kept 9 rows" in result.output and "dropped 9 rows" in result.output
    assert "kept 9 rows" in planned and "dropped would be about 9 rows" in planned
    assert project.contents() == published
    assert project.gc("--pairs", project.root / "pairs").output.count("kept 9 rows") == 1


def test_journals_of_other_sketches_go_when_asked_and_only_then(project):
    other = project.home / "sketch-journal" / ("0" * 32)
    shutil.copytree(project.journal, other)
    pairs = project.root / "pairs"
    assert project.gc("--pairs", pairs).output.count("kept 18 rows") == 2
    refused = project.gc("--pairs", pairs, "--other-references")
    assert refused.exit_code == 2 and "dvc repro score" in refused.stderr  # no log-probs were published here
    write = {"--reference": project.out, "--sketches": project.out}
    result = project.run("gc", "--pairs", pairs, *(w for o in write.items() for w in o), "--other-references")
    assert result.exit_code == 0 and not (other / "rows.journal").exists() and len(project.rows()) == 18


# inspect --------------------------------------------------------------------------------------------------------------


def test_inspect_shows_identity_groups_and_norms(project):
    result = project.run("inspect", project.out, "--extremes", 2)
    assert result.exit_code == 0, result.output
    for part in ("tensorsketch", "last_block", project.identity.reference_id, "block_001", "Distributions of gradient"):
        assert part in result.output
    assert "tokenizer" not in result.output and result.output.count("\n  response_key") == 2
    found = json.loads(project.run("inspect", project.out, "--extremes", 3, "--json").stdout)
    norms = pl.read_parquet(project.out / "*.parquet", columns=["grad_norm"])["grad_norm"]
    assert (found["kind"], found["rows"], found["groups"]) == ("sketches", 18, {"block_001": 32})
    assert found["grad_norm"]["max"] == norms.max() and found["grad_norm"]["mean"] == pytest.approx(norms.mean())
    assert [row["grad_norm"] for row in found["extremes"]["lowest_grad_norm"]] == norms.sort().head(3).to_list()


def test_inspect_of_an_empty_publication_says_mode_none(project):
    none = SketchIdentity(mode="none")
    assert none.kind == sketch_kind({}) or none.kind.schema.names == ["response_key", "grad_norm"]
    publish_reference(project.out, none.kind.schema.empty_table(), none)
    result = project.run("inspect", project.out)
    assert result.exit_code == 0 and {"mode", "none"} <= set(result.output.split())
