"""Publishing: the same files for the same rows, old or new state at every moment, and nothing lost when it fails."""

import os
import shutil

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache import (
    LOGPS_SCHEMA,
    CacheError,
    CacheIncomplete,
    CacheLocked,
    open_reference,
    publish_reference,
    shards,
    verify,
)
from cache.publish import _sole_publisher
from tests.cache import processes
from tests.cache.rows import identity, keys_of, make_rows


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def publish(folder, rows, **changes):
    publish_reference(folder, rows, identity(**changes))
    return contents(folder)


def read(folder):
    return open_reference(folder, expect=None).scan().collect().to_arrow().cast(LOGPS_SCHEMA)


def in_key_order(rows):
    return rows.sort_by("response_key")


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_ROWS", 10)


def test_what_is_published_is_what_is_read(tmp_path):
    publish(tmp_path, make_rows(0, 50))
    assert read(tmp_path).equals(in_key_order(make_rows(0, 50)))
    assert verify(tmp_path) == []


@pytest.mark.slow
@given(st.randoms(use_true_random=False), st.integers(1, 60))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_row_order_and_chunking_do_not_change_a_byte(tmp_path, small_shards, randoms, n_rows):
    rows = make_rows(0, n_rows)
    order = list(range(n_rows))
    randoms.shuffle(order)
    cuts = sorted(randoms.choices(range(n_rows + 1), k=3))
    shuffled = rows.take(order)
    chunked = pa.concat_tables([shuffled.slice(a, b - a) for a, b in zip([0, *cuts], [*cuts, n_rows], strict=True)])
    for folder in ("plain", "shuffled", "polars"):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
    plain = publish(tmp_path / "plain", rows)
    assert publish(tmp_path / "shuffled", chunked) == plain
    assert publish(tmp_path / "polars", pl.DataFrame(shuffled).to_arrow()) == plain


def test_history_does_not_change_a_byte(tmp_path, small_shards):
    once = publish(tmp_path / "once", make_rows(0, 90))
    for rows in (make_rows(0, 90), make_rows(0, 30), make_rows(0, 0), make_rows(20, 70), make_rows(0, 90)):
        grown = publish(tmp_path / "often", rows)
    assert grown == once


def test_another_process_writes_the_same_bytes(tmp_path):
    assert processes.run(processes.publish, tmp_path / "there", 0, 200) == 0
    assert contents(tmp_path / "there") == publish(tmp_path / "here", make_rows(0, 200))


def test_unchanged_shards_are_not_touched(tmp_path, small_shards):
    publish(tmp_path, make_rows(0, 90))
    before = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    publish(tmp_path, make_rows(0, 90))
    assert {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in tmp_path.iterdir()} == before


def test_files_are_replaced_never_edited(tmp_path, small_shards):
    """DVC keeps hard links to the files and makes them read-only."""
    before = publish(tmp_path / "cache", make_rows(0, 50))
    shutil.copytree(tmp_path / "cache", tmp_path / "dvc", copy_function=os.link)
    for path in (tmp_path / "cache").iterdir():
        path.chmod(0o444)
    publish(tmp_path / "cache", make_rows(0, 90), weights="c3" * 32)
    assert contents(tmp_path / "dvc") == before


def test_files_that_are_no_shards_stay(tmp_path):
    publish(tmp_path, make_rows(0, 5))
    (tmp_path / "drift.json").write_text("{}")
    assert publish(tmp_path, make_rows(0, 9))["drift.json"] == b"{}"
    assert verify(tmp_path) == []


def test_publishing_mends_a_damaged_shard(tmp_path):
    sound = publish(tmp_path, make_rows(0, 50))
    shard = next(tmp_path.glob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-50] + bytes(50))
    assert publish(tmp_path, make_rows(0, 50)) == sound


def test_the_number_of_shards_is_a_power_of_two_that_follows_from_the_rows(tmp_path):
    counts = {n: 1 << shards.partition_bits(n) for n in (0, 1, 50_000, 50_001, 100_000, 100_001, 5_000_000)}
    assert counts == {0: 1, 1: 1, 50_000: 1, 50_001: 2, 100_000: 2, 100_001: 4, 5_000_000: 128}


def test_a_large_cache_is_split_by_leading_key_bits(tmp_path, small_shards):
    publish(tmp_path, make_rows(0, 150))
    for number, path in enumerate(sorted(tmp_path.glob("*.parquet"))):
        keys = pl.read_parquet(path)["response_key"].to_list()
        assert {key[0] >> 4 for key in keys} == {number}
        assert keys == sorted(keys)
    assert number == 15
    assert read(tmp_path).equals(in_key_order(make_rows(0, 150)))


def test_a_shard_is_readable_alone_and_says_what_it_is(tmp_path):
    publish(tmp_path, make_rows(0, 4500))
    (shard,) = tmp_path.glob("*.parquet")
    assert pl.scan_parquet(shard).collect_schema() == {
        "response_key": pl.Binary,
        "prompt_key": pl.Binary,
        "n_prompt_tokens": pl.Int32,
        "n_tokens": pl.Int32,
        "sum_logp": pl.Float64,
        "token_ids": pl.List(pl.Int32),
        "token_logps": pl.List(pl.Float32),
    }
    stated = pl.read_parquet_metadata(shard)["refcache"]
    assert f'"reference_id": "{identity().reference_id}"' in stated and '"dtype": "float32"' in stated
    metadata = pq.read_metadata(shard)
    assert [metadata.row_group(i).num_rows for i in range(3)] == [2000, 2000, 500]
    columns = {c.path_in_schema: c for c in map(metadata.row_group(0).column, range(7))}
    assert {c.compression for c in columns.values()} == {"ZSTD"}
    assert [name for name, c in columns.items() if c.has_dictionary_page] == ["token_ids.list.element"]
    assert [name for name, c in columns.items() if "BYTE_STREAM_SPLIT" in c.encodings] == [
        "sum_logp",
        "token_logps.list.element",
    ]


def test_a_repeated_key_is_refused_and_named(tmp_path):
    rows = pa.concat_tables([make_rows(0, 9), make_rows(4, 5)])
    with pytest.raises(ValueError, match=f"{keys_of(make_rows(4, 5))[0].hex()} was given twice"):
        publish_reference(tmp_path, rows, identity())
    assert contents(tmp_path) == {}


def test_rows_that_must_not_be_stored_leave_what_was_published(tmp_path, small_shards):
    before = publish(tmp_path, make_rows(0, 20))
    with pytest.raises(CacheError, match="above 0"):
        publish_reference(tmp_path, pa.concat_tables([make_rows(0, 60), make_rows(60, 61, shift=-5.0)]), identity())
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_killed_before_any_change_a_reader_sees_the_old_or_the_new_rows(tmp_path):
    old, new = in_key_order(make_rows(0, 30)), in_key_order(make_rows(10, 60))
    publish_reference(tmp_path / "start", old, identity())
    clean = publish(tmp_path / "clean", new, weights="c3" * 32)
    seen, code, step = [], processes.KILLED, 0
    while code == processes.KILLED:
        folder = tmp_path / f"killed-{step}"
        shutil.copytree(tmp_path / "start", folder)
        code = processes.run(processes.publish_dying_before_change, folder, step, 10, 60)
        found = read(folder)
        seen.append("old" if found.equals(old) else "new" if found.equals(new) else "neither")
        assert publish(folder, new, weights="c3" * 32) == clean
        step += 1
    assert code == 0 and step > 8
    assert seen == ["old"] * seen.count("old") + ["new"] * seen.count("new")
    assert {"old", "new"} == set(seen)


def test_killed_during_the_first_publication_there_is_no_cache_yet(tmp_path):
    assert processes.run(processes.publish_dying_before_change, tmp_path, 2, 0, 30) == processes.KILLED
    with pytest.raises(CacheIncomplete, match=r"no manifest\.json"):
        open_reference(tmp_path, expect=None)


@pytest.mark.slow
def test_readers_beside_a_publisher_always_find_a_whole_cache(tmp_path):
    publish(tmp_path, make_rows(0, 40))
    publisher = processes.start(processes.publish_alternately, tmp_path, 60)
    sizes = set()
    while publisher.is_alive():
        sizes.add(open_reference(tmp_path, expect=identity()).n_rows)
    publisher.join()
    assert publisher.exitcode == 0
    assert sizes == {40, 70}


@pytest.mark.parametrize("limit", [2_000, 12_000])
def test_a_full_disk_leaves_what_was_published(tmp_path, limit):
    before = publish(tmp_path, make_rows(0, 20))
    receiver, sender = processes.context.Pipe(duplex=False)
    assert processes.run(processes.publish_under_a_file_size_limit, tmp_path, 3000, limit, sender) == 0
    kind, message = receiver.recv()
    assert kind == "CacheError" and f"publish to {tmp_path}" in message and "intact" in message
    assert contents(tmp_path) == before


def test_a_second_publisher_is_refused(tmp_path):
    with (
        _sole_publisher(tmp_path),
        pytest.raises(CacheLocked, match=f"is being published by pid {os.getpid()} on host"),
    ):
        publish_reference(tmp_path, make_rows(0, 5), identity())


def test_an_empty_cache_can_be_published_and_read(tmp_path):
    publish(tmp_path, make_rows(0, 0))
    reference = open_reference(tmp_path, expect=identity())
    assert reference.keys() == set() and reference.n_rows == 0
    assert reference.sum_logps([]).dtype == np.float64
    assert verify(tmp_path) == []
