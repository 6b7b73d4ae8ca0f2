"""`refcache inspect s3://...`, and what commands that read folders say to such an address."""

import json

import pytest
from click.testing import CliRunner

from cache import publish_reference, shards
from stages.__main__ import main
from tests.cache import test_sketches
from tests.cache.rows import identity, make_rows


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REFCACHE_HOME", raising=False)
    monkeypatch.setattr(shards, "SHARD_ROWS", 10)
    publish_reference(tmp_path / "logps", make_rows(0, 30), identity())
    worst = [{"response_key": "0a" * 16, "n_tokens": 7, "drift": 0.75}]
    (tmp_path / "logps/drift.json").write_text(json.dumps({"responses": 64, "sequences": worst}))
    return tmp_path / "logps"


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_inspect_finds_there_what_it_finds_in_the_folder_and_fetches_it_once(server, folder):
    address = server.put(folder, folder.parent.name)
    found = [json.loads(run("inspect", path, "--json").stdout) for path in (folder, address)]
    assert [cache.pop("path") for cache in found] == [str(folder), address]
    assert found[0] == found[1] and found[0]["drift"]["worst"]
    server.asked.clear()
    assert f"path             {address}" in run("inspect", address).output
    assert server.objects_read(folder.parent.name) == {"manifest.json", "drift.json"}
    assert {path.name for path in (folder.parent / ".refcache").iterdir()} == {"remote"}


def test_inspect_reads_sketches_there(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    publish_reference(tmp_path / "sketches", test_sketches.make_rows(0, 20), test_sketches.IDENTITY)
    found = json.loads(run("inspect", server.put(tmp_path / "sketches", tmp_path.name), "--json").stdout)
    assert found["rows"] == 20 and found["groups"] == test_sketches.GROUPS


def test_inspect_refuses_a_damaged_object_in_one_message(server, folder):
    damaged = max(folder.glob("*.parquet"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    result = run("inspect", server.put(folder, folder.parent.name))
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert f"/{damaged.name} is damaged" in result.stderr


def test_inspect_of_an_address_without_a_publication_is_a_wrong_request(server):
    result = run("inspect", "s3://team/nothing")
    assert result.exit_code == 2 and result.stderr.startswith("Error: s3://team/nothing is no published reference")


@pytest.mark.parametrize("words", [("verify",), ("sketch-report",), ("score", "--out")])
def test_commands_that_want_a_folder_say_so_before_they_make_one(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*words, "s3://team/logps")
    assert result.exit_code == 2 and "s3://team/logps is in object storage" in result.stderr
    assert list(tmp_path.iterdir()) == []
