import json

import pytest
from click.testing import CliRunner

from cache import publish_reference
from stages.__main__ import main
from tests.cache.rows import identity, make_rows


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    publish_reference(tmp_path / "logps", make_rows(0, 30), identity())
    return tmp_path / "logps"


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_inspect_prints_identity_size_distributions_and_extremes(folder):
    result = run("inspect", folder, "--extremes", 2)
    assert result.exit_code == 0
    lines = {tuple(line.split()[:2]) for line in result.output.splitlines() if line.split()}
    assert {("reference_id", identity().reference_id), ("dtype", "float32"), ("rows", "30")} <= lines
    assert {"sum_logp", "token_logp"} <= {first for first, *_ in lines}
    assert result.output.count("\n  response_key") == 4
    assert "No text: data/prepared/tokenizer does not exist" in result.output


def test_inspect_json_is_one_object(folder):
    result = run("inspect", folder, "--json")
    assert json.loads(result.stdout)["rows"] == 30


def test_inspect_shows_how_many_rows_were_flagged_and_how_many_rescored(folder):
    worst = [{"response_key": "0a" * 16, "n_tokens": 7, "drift": 0.75}]
    drift = {"responses": 64, "tolerance": 0.25, "flagged": 3, "rescored": {"rows": 12, "keys": "9b1c"}}
    (folder / "drift.json").write_text(json.dumps(drift | {"sequences": worst}))
    output = run("inspect", folder).output
    assert "3 of 64 sampled rows above 0.25 nats (train.drift_tolerance)" in output
    assert "12 rows, with transformers in float32; digest of their keys 9b1c" in output
    assert f"{'0a' * 16}  7         0.75" in output


def test_decoded_text_cannot_act_on_the_terminal(folder, tmp_path):
    from tokenizers import Tokenizer, models

    (tmp_path / "tokenizer").mkdir()
    evil = Tokenizer(models.WordLevel({"\x1b[31m\x9b[bold]": 0}, unk_token="\x1b[31m\x9b[bold]"))
    evil.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    result = run("inspect", folder, "--tokenizer", tmp_path / "tokenizer")
    assert result.exit_code == 0 and r"\x1b[31m\x9b[bold]" in result.output
    assert not {"\x1b", "\x9b"} & set(result.output)


def test_verify_of_a_sound_cache_reports_each_shard(folder):
    result = run("verify", folder)
    assert result.exit_code == 0
    shard, summary = result.output.splitlines()
    assert shard.startswith("logps-00000-") and "sound, 30 rows" in shard and summary.endswith("logps: sound")


def test_verify_lists_every_finding_with_its_remedy_and_exits_1(folder):
    (shard,) = folder.glob("*.parquet")
    shard.unlink()
    (folder / "stray.parquet").write_bytes(b"")
    result = run("verify", folder)
    assert result.exit_code == 1
    assert f"{shard.name}: listed in the manifest but missing\n  Restore" in result.output
    assert "stray.parquet: not in the manifest\n  Move it away" in result.output
    assert "2 findings" in result.stderr


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_path_that_is_no_reference_cache_exits_2(folder, command):
    for path in (folder.parent, folder.parent / "absent"):
        result = run(command, path)
        assert result.exit_code == 2
        assert "Expected a folder with manifest.json" in result.stderr


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_damaged_manifest_exits_1(folder, command):
    (folder / "manifest.json").write_text("{")
    result = run(command, folder)
    assert result.exit_code == 1


@pytest.mark.parametrize("command", ["inspect", "sketch-report", "verify", "why-miss", "gc"])
def test_help_shows_an_example(command):
    help_text = run(command, "--help").output
    assert f"Example:\n    refcache {command}" in help_text


def test_repair_of_what_was_never_published_exits_2(folder):
    assert run("verify", folder.parent, "--repair", "--model", folder).exit_code == 2


def test_the_suites_cache_is_not_repaired_from_the_pairs(tmp_path):
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "suites"), "--repair"])
    assert result.exit_code == 2 and "dvc repro -f score" in result.output
