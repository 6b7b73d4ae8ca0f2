"""Reading: every key or an error, of the expected reference or an error, and never a damaged or foreign file."""

import json
import shutil

import numpy as np
import polars as pl
import pytest

from cache import (
    CacheCorrupt,
    CacheError,
    CacheIncomplete,
    CacheMismatch,
    open_reference,
    publish_reference,
    shards,
    verify,
)
from tests.cache.rows import identity, keys_of, make_rows


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Rows 0..59 in eight shards."""
    monkeypatch.setattr(shards, "SHARD_ROWS", 10)
    publish_reference(tmp_path / "logps", make_rows(0, 60), identity())
    return tmp_path / "logps"


@pytest.fixture
def shard(folder):
    return sorted(folder.glob("*.parquet"))[3]


def change_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_rows_come_in_the_order_asked_and_as_often(folder):
    asked = [7, 3, 59, 3, 0]
    rows = make_rows(0, 60)
    keys = [keys_of(rows)[i] for i in asked]
    reference = open_reference(folder, expect=identity())
    assert reference.rows(keys).equals(pl.DataFrame(rows)[asked])
    assert reference.rows(pl.Series(keys), ["n_tokens"]).columns == ["n_tokens"]
    np.testing.assert_array_equal(reference.sum_logps(keys), rows["sum_logp"].to_numpy()[asked])


def test_the_whole_cache_can_be_read(folder):
    reference = open_reference(folder, expect=None)
    rows = make_rows(0, 60)
    assert reference.keys() == set(keys_of(rows))
    assert reference.scan().collect().equals(pl.DataFrame(rows).sort("response_key"))
    assert (reference.n_rows, reference.n_tokens) == (60, sum(rows["n_tokens"].to_pylist()))
    assert reference.identity == identity()


def test_reader_names_the_missing_keys(folder):
    reference = open_reference(folder, expect=identity())
    absent = keys_of(make_rows(100, 105))
    asked = [*keys_of(make_rows(0, 5)), *absent, absent[0]]
    assert reference.missing(asked) == absent
    with pytest.raises(CacheIncomplete) as raised:
        reference.rows(asked)
    message = str(raised.value)
    assert f"lacks 5 of the 11 responses asked for (it has 60): {absent[0].hex()}, {absent[1].hex()}" in message
    assert "dvc repro score" in message
    with pytest.raises(CacheIncomplete):
        reference.sum_logps(asked)


def test_another_reference_is_refused(folder):
    with pytest.raises(CacheMismatch, match="dtype: found float32, expected bfloat16"):
        open_reference(folder, expect=identity(dtype="bfloat16"))


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("")])
def test_a_path_that_holds_no_cache_says_what_was_expected(tmp_path, make):
    make(tmp_path / "logps")
    for read in (lambda path: open_reference(path, expect=None), verify):
        with pytest.raises(CacheIncomplete, match=r"Expected a folder with manifest\.json and \*\.parquet"):
            read(tmp_path / "logps")


def test_a_newer_format_is_refused_politely(folder):
    change_manifest(folder, format_version=2, invented_later=True)
    for read in (lambda path: open_reference(path, expect=None), verify):
        with pytest.raises(
            CacheMismatch, match=r"format version 2; this refcache reads up to 1\..*newer refcache: upgrade"
        ):
            read(folder)


def test_another_kind_is_refused(folder):
    change_manifest(folder, kind="sketches")
    with pytest.raises(CacheMismatch, match="kind 'sketches', expected 'logps'"):
        open_reference(folder, expect=None)


def test_a_missing_shard_is_named(folder, shard):
    shard.unlink()
    with pytest.raises(CacheCorrupt, match=rf"{shard.name} is listed in the manifest but missing.*dvc"):
        open_reference(folder, expect=identity())
    assert [(f.file, f.problem) for f in verify(folder)] == [(shard.name, "listed in the manifest but missing")]


def test_a_truncated_shard_is_named(folder, shard):
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CacheCorrupt, match=rf"{shard.name} has \d+ bytes, expected \d+.*dvc"):
        open_reference(folder, expect=identity())
    (finding,) = verify(folder)
    assert (
        finding.file == shard.name and "bytes, expected" in finding.problem and "dvc repro -f score" in finding.remedy
    )


def test_verify_finds_every_flipped_byte(folder, shard):
    whole = shard.read_bytes()
    for position in range(0, len(whole), 97):
        shard.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        (finding,) = verify(folder)
        assert finding.file == shard.name and "hash to" in finding.problem
    shard.write_bytes(whole)
    assert verify(folder) == []


def test_a_shard_of_another_reference_is_refused(folder, shard, tmp_path):
    publish_reference(tmp_path / "other", make_rows(0, 60), identity(weights="c3" * 32))
    stranger = sorted((tmp_path / "other").glob("*.parquet"))[3]
    assert stranger.stat().st_size == shard.stat().st_size  # so that only its own statement gives it away
    shutil.copy(stranger, shard)
    with pytest.raises(CacheMismatch, match=rf"{shard.name} belongs to reference"):
        open_reference(folder, expect=identity())
    assert [finding.file for finding in verify(folder)] == [shard.name]


@pytest.mark.parametrize("name", ["mine.parquet", "logps-00000-0123456789abcdef0123456789abcdef.parquet"])
def test_a_stray_parquet_file_is_named(folder, shard, name):
    shutil.copy(shard, folder / name)
    with pytest.raises(CacheCorrupt, match=rf"{name}, which is not in its manifest.*Move such files away"):
        open_reference(folder, expect=identity())
    assert [(f.file, f.problem) for f in verify(folder)] == [(name, "not in the manifest")]


def test_any_unknown_file_is_found_by_verify(folder):
    (folder / "notes.txt").write_text("")
    (folder / "logps-00000.partial").write_text("")
    assert [finding.file for finding in verify(folder)] == ["logps-00000.partial", "notes.txt"]
    assert open_reference(folder, expect=identity()).n_rows == 60


@pytest.mark.parametrize(
    "changes",
    [
        {"n_rows": 61},
        {"n_tokens": 1},
        {"reference_id": "0" * 32},
        {"identity": {"weights": "f0"}},
        {"identity": None},
        {"shards": [{"file": "../elsewhere.parquet", "rows": 1, "tokens": 1, "bytes": 1, "blake2b": ""}]},
        {"shards": [{"file": "logps"}]},
        {"shards": None},
        {"format_version": "1"},
        {"extra": 1},
    ],
)
def test_an_altered_manifest_is_corrupt(folder, changes):
    change_manifest(folder, **changes)
    with pytest.raises(CacheCorrupt, match=r"manifest\.json"):
        open_reference(folder, expect=None)
    assert next(finding.file for finding in verify(folder)) == "manifest.json"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_manifest_that_is_no_json_object_is_corrupt(folder, content):
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(CacheCorrupt, match=r"manifest\.json"):
        open_reference(folder, expect=None)


def test_damage_met_while_reading_points_to_verify(folder, shard):
    reference = open_reference(folder, expect=identity())
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(CacheCorrupt, match="refcache verify"):
        reference.keys()


def test_a_publication_that_passes_while_reading_is_told_from_damage(folder):
    reference = open_reference(folder, expect=identity())
    publish_reference(folder, make_rows(0, 70), identity())
    with pytest.raises(CacheError, match=r"published anew while it was being read.*Run again"):
        reference.keys()
