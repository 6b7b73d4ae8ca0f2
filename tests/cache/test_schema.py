import numpy as np
import polars as pl
import pyarrow as pa
import pytest

import cache
from cache import LOGPS_SCHEMA, CacheError, check_logps
from cache.schema import LOGPS, conform
from tests.cache.rows import keys_of, make_rows

BAD = 4  # the row that each test spoils


def spoil(column, change):
    """Rows of which row BAD has its value of `column` replaced by change(value)."""
    rows = make_rows(0, 9)
    values = rows[column].to_pylist()
    values[BAD] = change(values[BAD])
    position = rows.column_names.index(column)
    return rows.set_column(position, LOGPS_SCHEMA.field(column), pa.array(values, LOGPS_SCHEMA.field(column).type))


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        ("token_logps", lambda v: [float("nan"), *v[1:]], "NaN or infinite"),
        ("token_logps", lambda v: [*v[:-1], float("inf")], "NaN or infinite"),
        ("token_logps", lambda v: [*v[:-1], float("-inf")], "NaN or infinite"),
        ("token_logps", lambda v: [*v[:-1], 1e-6], "above 0"),
        ("token_logps", lambda v: v[:-1], "token_logps of another length"),
        ("token_ids", lambda v: [*v, 1], "token_ids of another length"),
        ("n_tokens", lambda v: v + 1, "another length than n_tokens"),
        ("n_tokens", lambda v: 0, "is empty"),
        ("n_prompt_tokens", lambda v: 0, "no prompt token"),
        ("sum_logp", lambda v: v * (1 + 1e-7), "not the float64 sum"),
        ("sum_logp", lambda v: float("nan"), "not the float64 sum"),
    ],
)
def test_a_value_that_must_not_be_stored_is_refused_with_its_key(column, change, message):
    rows = spoil(column, change)
    with pytest.raises(CacheError, match=f"{keys_of(rows)[BAD].hex()}.*{message}"):
        check_logps(rows)
    check_logps(make_rows(0, 9))


def test_the_bad_row_is_named_also_in_a_slice_of_a_larger_table():
    rows = spoil("token_logps", lambda v: [0.5, *v[1:]])
    with pytest.raises(CacheError, match=keys_of(rows)[BAD].hex()):
        check_logps(pa.concat_tables([make_rows(20, 30), rows]).slice(5))
    check_logps(rows.slice(BAD + 1))


def test_missing_values_are_refused():
    rows = spoil("token_logps", lambda v: [None, *v[1:]])
    with pytest.raises(CacheError, match="token_logps holds nulls"):
        check_logps(rows)
    with pytest.raises(ValueError, match="prompt_key has 1 nulls"):
        conform(
            spoil("prompt_key", lambda v: None).cast(pa.schema([f.with_nullable(True) for f in LOGPS_SCHEMA])), LOGPS
        )


def test_the_sum_is_taken_in_float64():
    logps = np.full(100_000, -0.1, dtype=np.float32)
    rows = cache.logps_table(
        response_keys=[b"r" * 16],
        prompt_keys=[b"p" * 16],
        n_prompt_tokens=[1],
        token_ids=[np.zeros(100_000, np.int32)],
        token_logps=[logps],
    )
    assert rows["sum_logp"][0].as_py() == pytest.approx(100_000 * float(logps[0]), rel=1e-12)
    check_logps(rows)


def test_rows_that_went_through_polars_are_accepted():
    rows = make_rows(0, 9)
    assert conform(pl.DataFrame(rows).to_arrow(), LOGPS).equals(rows)


def test_absent_columns_are_named():
    with pytest.raises(ValueError, match=r"absent are \['sum_logp'\]"):
        conform(make_rows(0, 2).drop_columns(["sum_logp"]), LOGPS)


def test_every_public_name_exists_and_is_listed_once():
    assert sorted(cache.__all__, key=str.lower) == sorted(set(cache.__all__), key=str.lower)
    assert all(hasattr(cache, name) for name in cache.__all__)
