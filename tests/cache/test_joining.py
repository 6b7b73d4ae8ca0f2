"""Coverage and join of whole files of pairs against a dict, whatever is asked and however often."""

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache import (
    CacheIncomplete,
    join_rows,
    join_sum_logps,
    key_batches,
    open_reference,
    open_view,
    publish_reference,
    require_keys,
    shards,
    spill,
)
from tests.cache.rows import identity, keys_of, make_rows

N_ROWS, N_ABSENT = 90, 10  # of 100 known rows, the last ten are not in the reference cache
ALL = make_rows(0, N_ROWS + N_ABSENT)
KEYS = keys_of(ALL)
SUMS = dict(zip(KEYS, ALL["sum_logp"].to_pylist(), strict=True))
rows = st.integers(0, N_ROWS - 1)


@pytest.fixture
def reference(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_ROWS", 10)
    monkeypatch.setattr(spill, "BUFFER_BYTES", 200)
    publish_reference(tmp_path / "logps", make_rows(0, N_ROWS), identity())
    return open_reference(tmp_path / "logps", expect=None)


def batches(pairs, size=4):
    """(chosen row, rejected row) as record batches of two key columns."""
    columns = [pa.array([KEYS[pair[side]] for pair in pairs], pa.binary(16)) for side in (0, 1)]
    return pa.table(columns, names=["chosen_key", "rejected_key"]).to_batches(size)


@given(st.lists(st.tuples(rows, rows), max_size=60))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_join_gives_what_a_dict_gives(reference, tmp_path, pairs):
    expected = [[SUMS[KEYS[chosen]], SUMS[KEYS[rejected]]] for chosen, rejected in pairs]
    found = join_sum_logps(reference, batches(pairs), scratch=tmp_path / "scratch")
    np.testing.assert_array_equal(found, np.array(expected).reshape(found.shape))
    require_keys(reference, batches(pairs), scratch=tmp_path / "scratch")
    assert list((tmp_path / "scratch").iterdir()) == []


@given(st.lists(st.tuples(rows, st.integers(N_ROWS, N_ROWS + N_ABSENT - 1)), min_size=1, max_size=30))
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_missing_is_counted_once_each_and_the_first_are_named(reference, tmp_path, pairs):
    absent = sorted({KEYS[rejected] for _, rejected in pairs})
    asked = len({KEYS[row] for pair in pairs for row in pair})
    named = ", ".join(key.hex() for key in absent[:3]) + (", ..." if len(absent) > 3 else "") + "."
    for read in (require_keys, join_sum_logps):
        with pytest.raises(CacheIncomplete) as raised:
            read(reference, batches(pairs), scratch=tmp_path / "scratch")
        assert f"lacks {len(absent)} of the {asked} responses asked for (it has {N_ROWS}): {named}" in str(raised.value)


def test_pairs_are_read_from_their_parquet_file(reference, tmp_path):
    pairs = [(i % N_ROWS, (7 * i + 1) % N_ROWS) for i in range(300)]
    table = pa.Table.from_batches(batches(pairs)).append_column("source", [["a line"] * 300])
    pq.write_table(table, tmp_path / "pairs.parquet", row_group_size=50)
    read = key_batches(tmp_path / "pairs.parquet", ["chosen_key", "rejected_key"])
    found = join_sum_logps(reference, read, scratch=tmp_path / "scratch")
    np.testing.assert_array_equal(found, [[SUMS[KEYS[row]] for row in pair] for pair in pairs])
    np.testing.assert_array_equal(found[:, 0], reference.sum_logps([KEYS[row] for row, _ in pairs]))


def test_no_pairs_are_covered_by_anything(reference, tmp_path):
    assert join_sum_logps(reference, batches([]), scratch=tmp_path).size == 0
    require_keys(reference, [], scratch=tmp_path)


@pytest.fixture(params=["reference", "view"])
def stored(reference, tmp_path, request):
    return reference if request.param == "reference" else open_view(reference, tmp_path / "views")


def test_joined_rows_stand_beside_the_keys_that_asked_for_them(stored):
    asked = [7, 3, 7, 89, 0]
    frame = pl.DataFrame({"chosen_key": [KEYS[row] for row in asked], "line": range(len(asked))})
    found = join_rows(frame, stored, on="chosen_key", columns=["token_logps", "sum_logp"], prefix="chosen_")
    assert found.columns == ["chosen_key", "line", "chosen_token_logps", "chosen_sum_logp"]
    assert found["line"].to_list() == list(range(len(asked)))
    assert found["chosen_sum_logp"].to_list() == [SUMS[KEYS[row]] for row in asked]
    assert found["chosen_token_logps"].to_list() == [ALL["token_logps"][row].as_py() for row in asked]
    assert join_rows(frame.head(0), stored, on="chosen_key").schema["sum_logp"] == pl.Float64


def test_a_join_that_misses_rows_says_so_or_gives_the_nulls_that_were_asked_for(stored):
    frame = pl.DataFrame({"key": [KEYS[N_ROWS], KEYS[5], KEYS[N_ROWS + 1], KEYS[N_ROWS]]})
    with pytest.raises(CacheIncomplete, match=f"lacks 2 of the 4 responses .*: {KEYS[N_ROWS].hex()}, "):
        join_rows(frame, stored, on="key")
    found = join_rows(frame, stored, on="key", columns=["sum_logp", "token_logps"], missing="null")
    assert found["sum_logp"].to_list() == [None, SUMS[KEYS[5]], None, None]
    assert found["token_logps"].is_null().to_list() == [True, False, True, True]


def test_a_join_refuses_null_keys_keys_as_text_and_columns_that_are_there(stored):
    for keys, says in (([KEYS[0], None], "1 of 2 keys are null"), ([KEYS[0].hex()], r"str\.decode\('hex'\)")):
        with pytest.raises(ValueError, match=says):
            join_rows(pl.DataFrame({"key": keys}), stored, on="key")
    for mistaken in ({"missing": "nul"}, {"columns": "sum_logp"}):
        with pytest.raises(ValueError, match="expected a list of names, and 'error' or 'null'"):
            join_rows(pl.DataFrame({"key": [KEYS[0]]}), stored, on="key", **mistaken)
    with pytest.raises(ValueError, match="already has sum_logp"):
        join_rows(pl.DataFrame({"key": [KEYS[0]], "sum_logp": [0.0]}), stored, on="key")
