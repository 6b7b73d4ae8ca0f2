"""Whole files of preference pairs against the reference cache, in memory that follows neither the pairs nor the rows.

The keys that are asked for are bucketed as the shards are, by their leading bits, and then each bucket meets the few
row groups that can hold its keys.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from cache.errors import CacheIncomplete, system_errors
from cache.key_set import KeySet, key_array, key_bytes
from cache.reference import SHOWN_KEYS, Reference, StoredRows
from cache.schema import KEY_COLUMN
from cache.shards import partition_bits
from cache.spill import Spill, spill_folder
from cache.view import ReferenceView

BATCH_ROWS = 1 << 15
SLOT = "slot"  # row * columns + column of an asked key, int64


def key_batches(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The key columns of a Parquet file of pairs, a batch at a time."""
    with pq.ParquetFile(path, pre_buffer=False) as file:  # which would hold the columns of the whole file
        yield from file.iter_batches(BATCH_ROWS, columns=columns)


def require_keys(reference: Reference, batches: Iterable[pa.RecordBatch], *, scratch: Path) -> None:
    """Raise CacheIncomplete unless `reference` has a row for every key in `batches`, all of whose columns are keys.

    scratch: folder for temporary files, 24 bytes a key; memory holds one partition of the reference's keys.
    """
    with _bucketed(reference, batches, scratch) as asked:
        for _ in _matched(reference, asked, []):
            pass


def join_sum_logps(
    reference: Reference, batches: Iterable[pa.RecordBatch], *, scratch: Path
) -> npt.NDArray[np.float64]:
    """log pi_ref in nats of every key in `batches`, (rows, columns) float64; otherwise as `require_keys`."""
    with _bucketed(reference, batches, scratch) as asked:
        joined = np.empty(asked.shape)
        for slots, sums in _matched(reference, asked, ["sum_logp"]):
            joined.ravel()[slots] = sums
    return joined


def join_rows(
    frame: pl.DataFrame,
    stored: StoredRows | ReferenceView,
    *,
    on: str,
    columns: Sequence[str] = ("sum_logp",),
    prefix: str = "",
    missing: Literal["error", "null"] = "error",
) -> pl.DataFrame:
    """`frame` with `columns` of the stored row that its key column `on` names, as PREFIXcolumn; its rows stay in order.

    An inner join leaves out rows whose key is not stored, and a left join gives them nulls, both without a word. Here
    such a key raises CacheIncomplete, which counts them and names the first; missing="null" asks for the nulls.
    frame, result: in memory, for pairs without number see `join_sum_logps`. stored: what `open_reference` gave, or for
    many small frames `open_view`. Raises ValueError for a null key, for keys that are no bytes, and for a column that
    `frame` already has.
    """
    if isinstance(columns, str) or missing not in ("error", "null"):
        raise ValueError(f"columns={columns!r}, missing={missing!r}; expected a list of names, and 'error' or 'null'")
    if frame[on].dtype != pl.Binary:
        raise ValueError(
            f"the column {on} is {frame[on].dtype}; keys are 16 bytes (Binary). Of hex text they are "
            f"frame.with_columns(pl.col({on!r}).str.decode('hex'))"
        )
    taken = sorted({prefix + name for name in columns} & set(frame.columns))
    if taken:
        raise ValueError(f"the frame already has {', '.join(taken)}; give a prefix for what is joined to it")
    keys = key_array(frame[on])
    found, places = stored.find(keys, columns)
    absent = places < 0
    if missing == "error" and absent.any():
        reference = stored.reference if isinstance(stored, ReferenceView) else stored
        once = dict.fromkeys(key_bytes(keys[absent]))
        raise CacheIncomplete(reference.incomplete(len(once), once, len(keys)))
    row = pl.Series(places).set(pl.Series(absent), None)
    return frame.with_columns(found[name].gather(row).alias(prefix + name) for name in columns)


class _Asked(NamedTuple):
    keys: Spill  # of KEY_COLUMN and SLOT
    shape: tuple[int, int]  # rows and columns over all batches


@contextmanager
def _bucketed(reference: Reference, batches: Iterable[pa.RecordBatch], scratch: Path) -> Iterator[_Asked]:
    kept = f"Temporary files go to {scratch}; nothing else was changed."
    with system_errors(f"look rows up in {reference.place}", kept=kept), spill_folder(scratch) as folder:
        spill = Spill(folder, partition_bits(reference.n_rows))
        n_rows = n_columns = 0
        for batch in batches:
            n_columns = batch.num_columns
            for number, column in enumerate(batch.columns):
                slots = np.arange(n_rows, n_rows + len(column)) * n_columns + number
                spill.add(pa.table({KEY_COLUMN: column.cast(pa.binary(16)), SLOT: slots}))
            n_rows += batch.num_rows
        yield _Asked(spill, (n_rows, n_columns))


def _matched(
    reference: Reference, asked: _Asked, columns: list[str]
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]]:
    """(slots, values of the column), bucket by bucket; CacheIncomplete comes last, since it counts all that is missing.

    columns: at most one, of float64; without any, the values are undefined.
    """
    n_asked, n_absent, absent = 0, 0, list[bytes]()
    for number in range(1 << asked.keys.bits):
        bucket = pa.concat_tables([_NO_KEYS, *asked.keys.take(number)])
        keys = key_array(bucket[KEY_COLUMN])
        wanted = KeySet(keys)
        values, missing = np.empty(len(wanted)), np.ones(len(wanted), np.bool_)
        for positions, rows in reference.matching(wanted, columns):
            missing[positions] = False
            for column in columns:
                values[positions] = rows[column].to_numpy()
        n_asked += len(wanted)
        n_absent += int(missing.sum())
        absent += key_bytes(wanted.array[missing][: SHOWN_KEYS - len(absent)])
        yield bucket[SLOT].to_numpy(), values[wanted.positions(keys)]
    if n_absent:
        raise CacheIncomplete(reference.incomplete(n_absent, absent, n_asked))


_NO_KEYS = pa.Table.from_batches([], pa.schema([pa.field(KEY_COLUMN, pa.binary(16)), pa.field(SLOT, pa.int64())]))
