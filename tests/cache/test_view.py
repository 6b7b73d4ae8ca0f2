"""The data loader's view: the same rows as the publication it was made of, at random, and never a stale or torn one."""

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from cache import (
    CacheIncomplete,
    derived,
    key_bytes,
    open_reference,
    open_view,
    publish_reference,
    remove_views,
    shards,
    view,
)
from tests.cache import processes
from tests.cache.rows import identity, keys_of, make_rows

N_ROWS = 60
ROWS = {row["response_key"]: row for row in make_rows(0, N_ROWS).to_pylist()}


@pytest.fixture
def reference(tmp_path, monkeypatch):
    """Rows 0..59 in eight shards."""
    monkeypatch.setattr(shards, "SHARD_ROWS", 10)
    publish_reference(tmp_path / "logps", make_rows(0, N_ROWS), identity())
    return open_reference(tmp_path / "logps", expect=None)


@pytest.fixture
def views(tmp_path):
    return tmp_path / "views"


def require_equal(keys, found):
    for key, n_tokens, sum_logp, ids, logps in zip(keys, *found, strict=True):
        row = ROWS[key]
        assert (n_tokens, sum_logp) == (row["n_tokens"], row["sum_logp"])
        assert ids.tolist() == row["token_ids"] and logps.tolist() == row["token_logps"]


def test_rows_come_in_the_order_asked_and_as_often(reference, views):
    keys = keys_of(make_rows(0, N_ROWS))
    asked = [keys[i] for i in (7, 3, 59, 3, 0)]
    for given in (asked, pl.Series(asked)):
        require_equal(asked, open_view(reference, views).rows(given))
    found = open_view(reference, views).rows([])
    assert [len(column) for column in found] == [0] * 4


def test_a_key_that_ends_in_zeros_is_handed_out_whole_and_taken_back(tmp_path, views):
    table = make_rows(0, N_ROWS)
    keys = [number.to_bytes(14, "big") + bytes(2) for number in range(N_ROWS)]
    place = table.schema.get_field_index("response_key")
    publish_reference(
        tmp_path / "logps",
        table.set_column(place, table.schema.field(place), pa.array(keys, pa.binary(16))),
        identity(),
    )
    opened = open_view(open_reference(tmp_path / "logps", expect=None), views)
    seen = []
    for batch, rows in opened.shuffled(7, seed=0):
        for key, n_tokens in zip(batch, rows.n_tokens, strict=True):
            assert opened.rows([key]).n_tokens == opened.rows([bytes(key)]).n_tokens == [n_tokens]
            seen.append(bytes(key))
    assert sorted(seen) == keys


def test_missing_keys_are_an_error_that_names_them(reference, views):
    absent = keys_of(make_rows(100, 105))
    with pytest.raises(CacheIncomplete, match=rf"lacks 5 of the 7 responses asked for .*: {absent[0].hex()}"):
        open_view(reference, views).rows([*ROWS][:1] + absent + absent[:1])


def test_values_are_mapped_not_copied(reference, views):
    opened = open_view(reference, views)
    first, again = opened.rows([*ROWS][:9]), opened.rows([*ROWS][:9])
    for one, other in zip(first.token_logps, again.token_logps, strict=True):
        assert not one.flags.writeable and np.shares_memory(one, other)


def test_an_epoch_holds_every_row_once_in_the_order_of_its_seed(reference, views):
    opened = open_view(reference, views)
    orders = []
    for seed in (1, 1, 2):
        batches = [(key_bytes(keys), rows) for keys, rows in opened.shuffled(7, seed=seed)]
        assert [len(keys) for keys, _ in batches] == [7] * 8 + [4]
        for keys, rows in batches:
            require_equal(keys, rows)
        orders.append([key for keys, _ in batches for key in keys])
        assert sorted(orders[-1]) == sorted(ROWS)
    assert orders[0] == orders[1] != orders[2]


def test_polars_reads_the_file(reference, views):
    path = open_view(reference, views).path
    expected = reference.scan().select("response_key", "n_tokens", "sum_logp", "token_ids", "token_logps").collect()
    assert pl.read_ipc(path / view.ROWS).equals(expected)


def test_a_view_is_built_once_per_publication(reference, views, monkeypatch):
    first = open_view(reference, views)
    publish_reference(reference.path, make_rows(0, 20), identity())
    newer = open_reference(reference.path, expect=None)
    assert len(open_view(newer, views)) == 20 and len(first) == N_ROWS
    require_equal([*ROWS], first.rows([*ROWS]))  # of the publication it was opened for
    monkeypatch.setattr(view, "_build", None)
    assert len(open_view(newer, views)) == 20


def test_a_torn_view_is_built_anew(reference, views):
    path = open_view(reference, views).path
    for damage in (
        lambda: (path / view.ROWS).write_bytes((path / view.ROWS).read_bytes()[:-1]),
        lambda: (path / view.KEYS).unlink(),
        lambda: (path / derived.SIZES).write_text("{"),
    ):
        damage()
        require_equal([*ROWS], open_view(reference, views).rows([*ROWS]))


def test_a_killed_builder_leaves_nothing_that_is_opened(reference, views):
    assert processes.run(processes.build_a_view_dying_at_the_rename, reference.path, views) == processes.KILLED
    assert [path.suffix for path in sorted(views.iterdir()) if path.is_dir()] == [".partial"]
    require_equal([*ROWS], open_view(reference, views).rows([*ROWS]))
    assert [path.suffix for path in sorted(views.iterdir()) if path.is_dir()] == [""]


def test_of_many_processes_one_builds_and_all_open(reference, views):
    running = [processes.start(processes.read_a_view, reference.path, views) for _ in range(4)]
    for process in running:
        process.join(60)
    assert [process.exitcode for process in running] == [0] * 4


def test_old_views_can_be_removed(reference, views):
    old = open_view(reference, views)
    publish_reference(reference.path, make_rows(0, 20), identity())
    newer = open_reference(reference.path, expect=None)
    kept = open_view(newer, views)
    assert remove_views(views, keep=[newer]) == [old.path]
    assert remove_views(views, keep=[newer]) == [] and kept.path.is_dir()
    require_equal([*ROWS][:5], old.rows([*ROWS][:5]))
    assert remove_views(views / "none", keep=[]) == []


def test_a_view_of_an_empty_reference_is_empty(tmp_path, views):
    publish_reference(tmp_path / "empty", make_rows(0, 0), identity())
    opened = open_view(open_reference(tmp_path / "empty", expect=None), views)
    assert len(opened) == 0 and list(opened.shuffled(5, seed=0)) == []
