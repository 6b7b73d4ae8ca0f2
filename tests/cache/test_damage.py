"""Whatever happens to a published file: verify finds it, readers refuse it with the remedy, and the rest is lent."""

import json
import shutil
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache import (
    CacheCorrupt,
    CacheError,
    CacheMismatch,
    open_reference,
    publish_reference,
    shards,
    verify,
)
from cache.repair import damaged_files, set_aside, sound_part
from tests.cache import processes
from tests.cache.rows import identity, keys_of, make_rows

ROWS = make_rows(0, 60)
SEVERAL = settings(max_examples=16, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Rows 0..59 in eight shards, one of them with several row groups."""
    monkeypatch.setattr(shards, "SHARD_ROWS", 10)
    monkeypatch.setattr(shards, "ROW_GROUP_ROWS", 4)
    publish_reference(tmp_path / "logps", ROWS, identity())
    return tmp_path / "logps"


@pytest.fixture
def names(folder):
    return sorted(path.name for path in folder.glob("*.parquet"))


def rows_of(folder: Path, name: str) -> set[bytes]:
    return set(pl.read_parquet(folder / name)["response_key"])


def require_refused(folder: Path, name: str) -> None:
    """Reading raises, and the message names the file and what to run."""
    with pytest.raises((CacheCorrupt, CacheMismatch)) as raised:
        open_reference(folder, expect=identity()).rows(keys_of(ROWS))
    assert name in str(raised.value)
    assert f"refcache verify {folder}" in str(raised.value) and "--repair" in str(raised.value)


def require_found(folder: Path, *names: str) -> None:
    findings = verify(folder)
    assert {finding.file for finding in findings} == set(names)
    assert all(finding.problem and "--repair" in finding.remedy for finding in findings)


@pytest.mark.slow
@given(which=st.integers(0, 7), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@SEVERAL
def test_a_flipped_bit_anywhere_is_found_refused_and_costs_only_its_shard(folder, names, which, where, bit):
    shard = folder / names[which]
    whole, lost = shard.read_bytes(), rows_of(folder, names[which])
    flipped = bytearray(whole)
    flipped[int(where * len(whole))] ^= 1 << bit
    shard.write_bytes(flipped)
    try:
        require_found(folder, shard.name)
        require_refused(folder, shard.name)
        assert sound_part(folder, identity()).keys() == set(keys_of(ROWS)) - lost
    finally:
        shard.write_bytes(whole)


@pytest.mark.slow
@given(which=st.integers(0, 7), share=st.floats(0, 1, exclude_max=True), tail=st.sampled_from([b"", bytes(512)]))
@SEVERAL
def test_a_torn_shard_is_found_refused_and_costs_only_its_rows(folder, names, which, share, tail):
    shard = folder / names[which]
    whole, lost = shard.read_bytes(), rows_of(folder, names[which])
    cut = whole[: int(share * len(whole))]
    shard.write_bytes((cut + tail + bytes(len(whole)))[: len(whole)] if tail else cut)  # zeros as a power cut leaves
    try:
        require_found(folder, shard.name)
        require_refused(folder, shard.name)
        assert sound_part(folder, identity()).keys() == set(keys_of(ROWS)) - lost
    finally:
        shard.write_bytes(whole)


def test_a_missing_shard_is_found_refused_and_costs_only_its_rows(folder, names):
    lost = rows_of(folder, names[2])
    (folder / names[2]).unlink()
    require_found(folder, names[2])
    require_refused(folder, names[2])
    assert sound_part(folder, identity()).keys() == set(keys_of(ROWS)) - lost


@pytest.mark.parametrize("swapped", ["in place of ours", "under its own name"])
def test_a_shard_of_another_reference_is_found_refused_and_never_lent(folder, names, tmp_path, swapped):
    publish_reference(tmp_path / "other", make_rows(0, 60, shift=1.0), identity(weights="c3" * 32))
    stranger = sorted((tmp_path / "other").glob("*.parquet"))[5]
    target = folder / (names[5] if swapped == "in place of ours" else stranger.name)
    shutil.copy(stranger, target)
    require_found(folder, target.name)
    require_refused(folder, target.name)
    part = sound_part(folder, identity())
    assert part.manifest.files == set(names) - {target.name}
    assert part.scan().collect()["sum_logp"].is_in(ROWS["sum_logp"].to_pylist()).all()


@pytest.mark.parametrize("name", ["mine.parquet", "logps-00000-0123456789abcdef0123456789abcdef.parquet"])
def test_a_stray_shard_is_found_refused_and_never_lent(folder, names, name):
    shutil.copy(folder / names[0], folder / name)
    require_found(folder, name)
    require_refused(folder, name)
    assert sound_part(folder, identity()).manifest.files == set(names)


@pytest.mark.parametrize("damage", ["cut", "altered", "of another reference", "of an earlier publication"])
def test_a_wrong_manifest_is_found_refused_and_costs_no_row(folder, names, tmp_path, damage):
    manifest = folder / "manifest.json"
    if damage == "cut":
        manifest.write_bytes(manifest.read_bytes()[:-40])
    elif damage == "altered":
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"n_rows": 61}))
    else:
        other = identity(weights="c3" * 32) if "reference" in damage else identity()
        publish_reference(tmp_path / "other", make_rows(0, 30), other)
        shutil.copy(tmp_path / "other" / "manifest.json", manifest)
    assert "manifest.json" in {f.file for f in verify(folder)} or set(names) <= {f.file for f in verify(folder)}
    with pytest.raises((CacheCorrupt, CacheMismatch), match=str(folder)):
        open_reference(folder, expect=identity())
    assert sound_part(folder, identity()).keys() == set(keys_of(ROWS))
    assert damaged_files(folder, identity())[1] == []  # the manifest is replaced by the next publication


def test_shards_that_share_keys_are_not_lent_twice(folder, names, tmp_path, monkeypatch):
    """A damaged manifest can't say which of two publications' shards is meant."""
    monkeypatch.setattr(shards, "SHARD_ROWS", 100)
    publish_reference(tmp_path / "coarse", ROWS, identity())
    (coarse,) = (tmp_path / "coarse").glob("*.parquet")
    shutil.copy(coarse, folder / coarse.name)
    (folder / "manifest.json").write_text("{")
    part = sound_part(folder, identity())
    assert part.scan().collect()["response_key"].is_duplicated().sum() == 0
    assert part.keys() <= set(keys_of(ROWS))


def test_a_drift_file_that_cannot_be_read_is_found(folder):
    (folder / "drift.json").write_text('{"per_')
    require_found(folder, "drift.json")


def test_what_is_bad_moves_aside_with_its_bytes_and_nothing_else_does(folder, names, tmp_path):
    (folder / names[3]).write_bytes(b"torn")
    (folder / "mine.parquet").write_bytes(b"mine")
    (folder / "notes.txt").write_text("notes")
    (folder / "logps-00000.partial").write_text("")  # for the next publication to clear away
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    findings, moved = damaged_files(folder, identity())
    assert len(findings) == 4 and moved == sorted([names[3], "mine.parquet", "notes.txt"])
    aside = set_aside(folder, moved, tmp_path / "damaged" / "ref")
    assert aside == tmp_path / "damaged" / "ref-1"
    assert set_aside(folder, [], tmp_path / "damaged" / "ref") == tmp_path / "damaged" / "ref-2"
    moved_bytes = {path.name: path.read_bytes() for path in aside.iterdir()}
    assert moved_bytes == {name: before[name] for name in [*moved, "manifest.json"]}
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {k: v for k, v in before.items() if k not in moved}


def test_repairing_for_another_reference_is_refused(folder, names):
    (folder / names[3]).write_bytes(b"torn")
    for _ in range(2):
        with pytest.raises(CacheMismatch, match="dtype: found float32, expected bfloat16"):
            damaged_files(folder, identity(dtype="bfloat16"))
        (folder / "manifest.json").write_text("{")  # then the shards say whose they are


def test_nothing_is_lent_where_nothing_is_published(tmp_path):
    assert sound_part(tmp_path, identity()) is None
    assert sound_part(tmp_path / "absent", identity()) is None


@pytest.mark.slow
def test_a_reader_beside_a_publisher_gets_exactly_the_old_or_the_new_rows(tmp_path):
    states = [pl.DataFrame(rows.sort_by("response_key")) for rows in (make_rows(0, 40), make_rows(20, 90))]
    publish_reference(tmp_path, make_rows(0, 40), identity())
    publisher = processes.start(processes.publish_alternately, tmp_path, 100_000)
    seen = {0: 0, 1: 0}
    while min(seen.values()) < 5 and publisher.is_alive():
        try:
            found = open_reference(tmp_path, expect=identity()).scan().collect()
        except CacheError as error:
            assert "published anew while it was being read" in str(error)
        except (FileNotFoundError, pl.exceptions.PolarsError):
            continue  # a collect of one's own meets the exchange without our words for it
        else:
            seen[[found.equals(state) for state in states].index(True)] += 1
    assert publisher.is_alive()
    publisher.kill()
    publisher.join()
    assert any(open_reference(tmp_path, expect=identity()).scan().collect().equals(state) for state in states)
