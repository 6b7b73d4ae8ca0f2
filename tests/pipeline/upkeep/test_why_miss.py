"""What makes stored rows count or not: `why-miss` names it, and nothing else costs a row."""

import json
import shutil

import pytest

from cache import Journal, ReferenceIdentity, open_reference, publish_reference
from cache.identity import IDENTITY, record_identity, recorded_identity
from pipeline.engine import supervision
from pipeline.params import ScoreParams
from pipeline.reference import identity
from pipeline.reference.scoring import score_responses
from tests.project import ScoredProject, write_project
from tests.tiny import write_pairs


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write_project(tmp_path_factory.mktemp("reuse"))


@pytest.fixture
def project(sound, tmp_path):
    shutil.copytree(sound, tmp_path / "project")
    return ScoredProject(tmp_path / "project")


def ask(project, *settings, **options):
    words = [word for setting in settings for word in ("--set", setting)]
    result = project.command("why-miss", "--json", *words, **({"--reference": project.out} | options))
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def differs(found):
    return set(found["published"]["differs"])


def test_everything_is_reused_when_nothing_changed(project):
    found = ask(project)
    assert (found["responses"], found["reusable"], found["missing"], found["reasons"]) == (24, 24, 0, [])
    text = project.command("why-miss", **{"--reference": project.out}).output
    assert text.startswith("24 of 24 responses would be reused, 0 scored") and text.count("\n") == 1


def test_the_same_weights_at_another_path_are_a_hit(project, tmp_path):
    moved = shutil.move(project.model, tmp_path / "elsewhere")
    assert ask(project, **{"--model": moved})["missing"] == 0


IRRELEVANT = [
    "train.learning_rate=0.123",
    "train.variants.dpo={objective: bdpo, beta: 0.7, mixture: 0.5}",
    "train.epochs=9.0",
    "train.dtype=bfloat16",
    "sft.seed=7",
    "prepare.split_seed=7",
    "evaluate.seed=7",
    "sweep.seeds=[5, 6]",
    "trainable=last_block",
    "score.max_num_seqs=3",
    "score.rows_per_call=1",
    "score.drift_sample=1",
    "score.tensor_parallel_size=2",
]


def test_settings_that_change_no_log_prob_are_a_hit(project):
    assert ask(project, *IRRELEVANT)["missing"] == 0


def test_another_learning_rate_beta_seed_objective_or_output_folder_scores_zero_rows(project, monkeypatch):
    """`score` itself is given neither; what it could see of them is its output folder and the trainer's dtype."""
    monkeypatch.setattr(supervision, "EngineProcess", lambda *_, **__: pytest.fail("an engine was started"))
    monkeypatch.setenv("REFCACHE_HOME", str(project.home))
    project.fill_journal()
    for out in ("logps", "other/logps"):
        options = {"model": project.model, "out": project.root / out, "metrics": project.metrics}
        params = ScoreParams(drift_sample=2)
        summary = score_responses(pairs=project.pairs, params=params, trainer_dtype="float32", **options)
        assert (summary["rows_scored"], summary["rows_reused"]) == (0, 24)
    same = [open_reference(project.root / out, expect=project.identity).keys() for out in ("logps", "other/logps")]
    assert same[0] == same[1]


def flip_one_element(project):
    file = project.model / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


def test_one_changed_weight_is_a_miss_that_names_the_field_and_both_values(project):
    flip_one_element(project)
    found = ask(project)
    assert differs(found) == {"weights"} and found["missing"] == 24
    theirs, ours = found["published"]["differs"]["weights"]
    (reason,) = found["reasons"]
    assert f"weights is {theirs[:12]} there, {ours[:12]} now" in reason and str(project.out) in reason
    assert reason in project.command("why-miss", **{"--reference": project.out}).output


@pytest.mark.parametrize(
    ("setting", "field"), [("score.dtype=bfloat16", "dtype"), ("score.quantization=fp8", "quantization")]
)
def test_another_dtype_or_quantisation_is_a_miss_that_names_the_field(project, setting, field):
    found = ask(project, setting)
    assert differs(found) == {field} and found["missing"] == 24


def test_another_engine_version_is_a_miss_that_names_the_field(project, monkeypatch):
    monkeypatch.setattr(identity, "engine_version", lambda: "0.99.0")
    found = ask(project)
    assert differs(found) == {"engine_version"} and "engine_version is 0." in found["reasons"][0]


def test_another_config_is_a_miss_that_names_the_field(project):
    file = project.model / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert differs(ask(project)) == {"config"}


def test_new_responses_and_new_prompts_are_told_apart(project):
    rows = open_reference(project.out, expect=None).scan().collect()
    prompts = sorted(set(rows["prompt_key"]))
    kept = rows.filter(~rows["prompt_key"].is_in(prompts[:2]))  # 6 rows under two prompts go
    kept = kept.filter(~kept["response_key"].is_in(kept["response_key"].head(1).implode()))  # and one more
    publish_reference(project.out, kept.to_arrow(), project.identity)
    found = ask(project)
    assert (found["reusable"], found["missing_responses"], found["missing_prompts"]) == (17, 1, 6)
    assert len(found["reasons"]) == 2 and "new prompts" in found["reasons"][1]


def test_when_no_prompt_is_known_the_tokenizer_or_the_dataset_is_named(project, tmp_path):
    found = ask(project, **{"--pairs": write_pairs(tmp_path / "others", 8, seed=9)})
    assert found["missing"] == found["missing_prompts"] == 24
    assert (
        found["reasons"] == [found["reasons"][0]] and "chat template or the truncation changed" in found["reasons"][0]
    )


def test_journalled_rows_count_also_while_their_writer_runs(project):
    project.fill_journal()
    shutil.rmtree(project.out)
    with Journal(project.home / "journal" / project.identity.reference_id):
        assert ask(project)["missing"] == 0


def test_rows_of_damaged_shards_are_missing_with_the_reason(project):
    lost = project.damage()
    found = ask(project)
    assert found["missing"] == len(lost) and "refcache verify" in found["reasons"][0]


def test_the_journal_of_another_reference_is_named_by_its_fields(project):
    project.fill_journal()
    record_identity(project.home / "journal" / project.identity.reference_id, project.identity)
    shutil.rmtree(project.out)
    found = ask(project, "score.dtype=bfloat16")
    assert found["journals"][0]["differs"] == {"dtype": ["float32", "bfloat16"]}
    assert "24 of these responses under another reference: dtype is float32 there" in found["reasons"][1]
    (project.home / "journal" / project.identity.reference_id / IDENTITY).unlink()
    assert "one that its folder does not name" in ask(project, "score.dtype=bfloat16")["reasons"][1]


def test_asking_changes_nothing(project):
    project.fill_journal()
    before = {path: path.stat().st_mtime_ns for path in sorted(project.root.rglob("*"))}
    ask(project, "score.dtype=bfloat16")
    assert {path: path.stat().st_mtime_ns for path in sorted(project.root.rglob("*"))} == before


def test_score_names_the_reference_of_its_journal(project, monkeypatch):
    monkeypatch.setenv("REFCACHE_HOME", str(project.home))
    options = {"model": project.model, "out": project.out, "metrics": project.metrics, "pairs": project.pairs}
    score_responses(params=ScoreParams(drift_sample=2), trainer_dtype="float32", **options)
    assert recorded_identity(project.home / "journal" / project.identity.reference_id, ReferenceIdentity) == (
        project.identity
    )


def test_a_wrong_request_exits_2(project, tmp_path):
    for options in ({"--pairs": tmp_path / "absent"}, {"--model": tmp_path / "absent"}):
        assert project.command("why-miss", **options).exit_code == 2
