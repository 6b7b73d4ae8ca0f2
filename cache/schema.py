"""What a stored row looks like, how it is written as Parquet, and which values are refused."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cache.errors import CacheError

FORMAT_VERSION = 1  # of manifest, shards and journal; a reader refuses a newer one
METADATA_KEY = b"refcache"  # in a shard's Parquet schema metadata
KEY_COLUMN = "response_key"  # every kind has it first, and is sorted by it

LOGPS_SCHEMA = pa.schema(
    [
        pa.field("response_key", pa.binary(16), nullable=False),
        pa.field("prompt_key", pa.binary(16), nullable=False),
        pa.field("n_prompt_tokens", pa.int32(), nullable=False),
        pa.field("n_tokens", pa.int32(), nullable=False),  # response tokens
        pa.field("sum_logp", pa.float64(), nullable=False),  # nats
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),  # (n_tokens,), of the response
        pa.field("token_logps", pa.list_(pa.float32()), nullable=False),  # (n_tokens,), nats
    ]
)


class Kind(NamedTuple):
    """A kind of reference cache: its name in the manifest, its columns, and what it refuses to store.

    shard_rows, row_group_rows: None for SHARD_ROWS and ROW_GROUP_ROWS, which suit rows of a few kilobytes.
    """

    name: str
    schema: pa.Schema
    dictionary: list[str]  # Parquet column paths; everything else is stored plain or byte-stream-split
    byte_stream_split: list[str]
    check: Callable[[pa.Table], None]  # raises CacheError naming the key of a row that must not be stored
    noun: str  # what its rows are, in messages
    stage: str  # of dvc.yaml, which writes it; named in messages
    shard_rows: int | None = None
    row_group_rows: int | None = None


def parquet_options(kind: Kind) -> dict[str, Any]:
    """Keyword arguments of pyarrow.parquet.ParquetWriter that make a kind's shards; part of the format."""
    return {
        "compression": "zstd",
        "compression_level": 3,
        "use_dictionary": kind.dictionary,
        "use_byte_stream_split": kind.byte_stream_split,
        "write_page_checksum": True,  # lets a reader notice a flipped byte without hashing the whole file
    }


ROW_GROUP_ROWS = 2000


def conform(table: pa.Table, kind: Kind) -> pa.Table:
    """`table` with exactly the kind's columns and types; accepts what polars exports (large lists, plain binary).

    Raises ValueError where a column is absent or a value does not fit.
    """
    absent = [name for name in kind.schema.names if name not in table.column_names]
    if absent:
        raise ValueError(f"rows of kind {kind.name} need the columns {kind.schema.names}; absent are {absent}")
    table = table.select(kind.schema.names)
    for name in table.column_names:
        if table[name].null_count:
            raise ValueError(f"column {name} has {table[name].null_count} nulls; every value is required")
    return table.cast(kind.schema)


def logps_table(
    *,
    response_keys: Sequence[bytes],
    prompt_keys: Sequence[bytes],
    n_prompt_tokens: Sequence[int],
    token_ids: Sequence[Sequence[int] | npt.NDArray[Any]],
    token_logps: Sequence[Sequence[float] | npt.NDArray[Any]],
) -> pa.Table:
    """Rows of LOGPS_SCHEMA from parallel sequences; n_tokens and sum_logp follow from `token_logps` (nats).

    Values are checked when they are written, not here.
    """
    floats = [np.asarray(values, dtype=np.float32) for values in token_logps]
    columns = [
        response_keys,
        prompt_keys,
        n_prompt_tokens,
        [values.size for values in floats],
        # Sum in float64: over 2,000 tokens float32 loses more than the drift we promise to measure.
        [float(np.add.reduce(values, dtype=np.float64)) for values in floats],
        _lists([np.asarray(ids, dtype=np.int32) for ids in token_ids], np.int32),
        _lists(floats, np.float32),
    ]
    arrays = [
        column if isinstance(column, pa.Array) else pa.array(column, type=field.type)
        for column, field in zip(columns, LOGPS_SCHEMA, strict=True)
    ]
    return pa.table(arrays, schema=LOGPS_SCHEMA)


def _lists(parts: list[npt.NDArray[Any]], dtype: Any) -> pa.ListArray:
    """A column of lists, from one array a row; made at once, which is several times as fast as row by row."""
    offsets = np.cumsum([0, *(part.size for part in parts)], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, np.concatenate([np.empty(0, dtype), *parts]))


def check_logps(table: pa.Table) -> None:
    """Raise CacheError, naming the row's key, unless every row of LOGPS_SCHEMA may be stored.

    Refused: NaN, infinities, a log-prob above 0, an empty response, a prompt without tokens, `token_ids`,
    `token_logps` and `n_tokens` of different lengths, and a `sum_logp` that is not the sum of `token_logps`.
    """
    for batch in table.to_batches():
        if batch.num_rows:
            _check_batch(batch)


def _check_batch(batch: pa.RecordBatch) -> None:
    n_tokens = batch["n_tokens"].to_numpy()
    lengths = {name: batch[name].value_lengths().to_numpy() for name in ("token_ids", "token_logps")}
    refuse(batch, batch["n_prompt_tokens"].to_numpy() < 1, "has no prompt token, so its first token has no log-prob")
    refuse(batch, n_tokens < 1, "is empty: a response needs at least one token")
    for name, found in lengths.items():
        refuse(batch, found != n_tokens, f"has {name} of another length than n_tokens")
        if batch[name].flatten().null_count:
            raise CacheError(f"{name} holds nulls; every token needs a value. Nothing of this batch was stored.")
    logps = batch["token_logps"].flatten().to_numpy().astype(np.float64)
    starts = np.concatenate([[0], np.cumsum(n_tokens[:-1], dtype=np.int64)])
    if not (logps <= 0).all() or not np.isfinite(logps.min()):  # seldom: which row it is takes longer to find
        refuse(batch, np.logical_or.reduceat(~np.isfinite(logps), starts), "has a log-prob that is NaN or infinite")
        refuse(batch, np.maximum.reduceat(logps, starts) > 0, "has a log-prob above 0, a probability above 1")
    sums, stated = np.add.reduceat(logps, starts), batch["sum_logp"].to_numpy()
    # All terms have one sign, so any order of summation agrees to n * 2^-53 of the sum; NaN must not slip through.
    agree = np.abs(stated - sums) <= 1e-10 * np.abs(sums)
    refuse(batch, ~agree, "has a sum_logp that is not the float64 sum of its token_logps")


def refuse(batch: pa.RecordBatch, bad: npt.NDArray[np.bool_], why: str) -> None:
    """Raise CacheError naming the first row that is `bad`, (rows,), if any is; `why` continues "Response KEY ..."."""
    if bad.any():
        rows = np.flatnonzero(bad)
        key = batch[KEY_COLUMN][int(rows[0])].as_py().hex()
        more = f" ({len(rows) - 1} more rows like it)" if len(rows) > 1 else ""
        raise CacheError(f"Response {key} {why}{more}. Nothing of this batch was stored.")


LOGPS = Kind(
    name="logps",
    schema=LOGPS_SCHEMA,
    dictionary=["token_ids.list.element"],
    byte_stream_split=["sum_logp", "token_logps.list.element"],
    check=check_logps,
    noun="log-probs",
    stage="score",
)
