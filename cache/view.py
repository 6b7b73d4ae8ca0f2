"""A local, memory-mapped copy of a reference cache for data loaders: random rows by key, without reading the others.

Parquet is decoded a row group at a time, which suits scans and not shuffled batches. The view holds the same rows as an
uncompressed Arrow IPC file, and their keys as one sorted array; both are mapped, not read. It is derived from one
publication, named by that publication's digest, and can be deleted at any time.
"""

import hashlib
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from cache.derived import build_once, sole_builder
from cache.errors import CacheIncomplete, system_errors
from cache.key_set import KEY, KeyArray, Keys, KeySet, key_array, key_bytes, whole_keys
from cache.manifest import manifest_bytes
from cache.reference import Reference
from cache.schema import KEY_COLUMN, LOGPS_SCHEMA

VIEW_VERSION = 1  # enters the name, so that a view of another layout is never opened
COLUMNS = ["n_tokens", "sum_logp", "token_ids", "token_logps"]
ROWS, KEYS = "rows.arrow", "keys.bin"
_NAME = re.compile("[0-9a-f]{32}")  # whatever else lies in the folder is not a view of a cache


class ViewRows(NamedTuple):
    """Rows of a view. The arrays in the lists are views into the mapped file, (n_tokens,) each, and read-only."""

    n_tokens: npt.NDArray[np.int32]  # (rows,)
    sum_logps: npt.NDArray[np.float64]  # (rows,), nats
    token_ids: list[npt.NDArray[np.int32]]
    token_logps: list[npt.NDArray[np.float32]]  # nats


def open_view(reference: Reference, folder: Path) -> "ReferenceView":
    """The view of `reference` in `folder`, for example .refcache/views; built first if it is not there or not whole.

    Takes 52 bytes of disk a row and 8 a token. Of several processes one builds, and the others wait. Raises CacheError
    when the system refuses, CacheCorrupt when a shard is damaged.
    """
    path = view_path(reference, folder)
    kept = "The reference cache is intact."
    with system_errors(f"build the view {path}", kept=kept):
        build_once(path, lambda partial: _build(partial, reference))
        return ReferenceView(path, reference)


def view_path(reference: Reference, folder: Path) -> Path:
    """Where the view of this very publication lies."""
    content = bytes([VIEW_VERSION]) + manifest_bytes(reference.manifest)
    return folder / hashlib.blake2b(content, digest_size=16, person=b"refcache").hexdigest()


def remove_views(folder: Path, *, keep: list[Reference]) -> list[Path]:
    """Delete the views in `folder` that are of none of the publications `keep`, and say which went.

    A process that has one open keeps its content until it ends.
    """
    if not folder.is_dir():
        return []
    kept = {view_path(reference, folder).name for reference in keep}
    with sole_builder(folder):
        named = sorted(path for path in folder.iterdir() if path.is_dir() and _NAME.match(path.name))
        old = [path for path in named if path.name not in kept]
        for path in old:
            shutil.rmtree(path)
    return old


class ReferenceView:
    """Rows by key or at random out of mapped memory; made by `open_view`. Positions number the rows in key order."""

    def __init__(self, path: Path, reference: Reference) -> None:
        self.path, self.reference = path, reference
        self.keys = KeySet.from_sorted(_map_keys(path / KEYS))
        self._file = pa.memory_map(str(path / ROWS))
        with pa.ipc.open_file(self._file) as reader:
            self._parts = [_Part(reader.get_batch(i)) for i in range(reader.num_record_batches)]
        self._starts = np.cumsum([0, *(len(part.n_tokens) for part in self._parts)])

    def __len__(self) -> int:
        return len(self.keys)

    def rows(self, keys: Keys) -> ViewRows:
        """One row for each of `keys`, in the order asked. Raises CacheIncomplete rather than leave any out."""
        asked = key_array(keys)
        positions = self.keys.positions(asked)
        if (positions < 0).any():
            absent = key_bytes(asked[positions < 0])
            raise CacheIncomplete(self.reference.incomplete(len(set(absent)), dict.fromkeys(absent), len(asked)))
        return self.rows_at(positions)

    def find(self, keys: Keys, columns: Sequence[str]) -> tuple[pl.DataFrame, npt.NDArray[np.int64]]:
        """As `Reference.find`; columns: of COLUMNS. Reads the rows that are found and no others."""
        positions = self.keys.positions(key_array(keys))
        is_there = positions >= 0
        rows = self.rows_at(positions[is_there])
        lists: dict[str, list[npt.NDArray[Any]]] = {"token_ids": rows.token_ids, "token_logps": rows.token_logps}
        arrays = {"n_tokens": pa.array(rows.n_tokens), "sum_logp": pa.array(rows.sum_logps)}
        arrays |= {name: list_column(lists[name], LOGPS_SCHEMA.field(name).type) for name in lists if name in columns}
        places = np.where(is_there, np.cumsum(is_there) - 1, -1)
        return pl.DataFrame(pa.table({name: arrays[name] for name in columns})), places

    def rows_at(self, positions: npt.NDArray[Any]) -> ViewRows:
        """The rows at `positions`, 0 to len(self) - 1, in the order asked."""
        positions = positions.astype(np.int64)
        numbers = self._starts.searchsorted(positions, side="right") - 1
        places = [(self._parts[n], row) for n, row in zip(numbers, positions - self._starts[numbers], strict=True)]
        return ViewRows(
            np.array([part.n_tokens[row] for part, row in places], np.int32),
            np.array([part.sum_logps[row] for part, row in places], np.float64),
            [part.token_ids[row] for part, row in places],
            [part.token_logps[row] for part, row in places],
        )

    def shuffled(self, batch_rows: int, *, seed: int) -> Iterator[tuple[npt.NDArray[np.void], ViewRows]]:
        """One epoch: (keys, rows) of every row once, in an order that `seed` determines; 4 bytes of memory a row.

        keys: (batch,) of dtype V16, whose items `rows` takes and `bytes` turns into keys.
        """
        order = np.arange(len(self), dtype=np.uint32 if len(self) < 1 << 32 else np.uint64)
        np.random.default_rng(seed).shuffle(order)
        for start in range(0, len(order), batch_rows):
            positions = order[start : start + batch_rows]
            yield whole_keys(self.keys.array[positions]), self.rows_at(positions)


def list_column(rows: Sequence[npt.NDArray[Any]], kind: pa.DataType) -> pa.ListArray:
    """An Arrow list column of type `kind` of one array a row."""
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    values = np.concatenate([np.empty(0, kind.value_type.to_pandas_dtype()), *rows])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), type=kind)


class _Lists:
    """A list column as numpy sees the mapped file: an index gives that row's values without copying them."""

    def __init__(self, column: pa.ListArray) -> None:
        self.offsets = column.offsets.to_numpy()  # (rows + 1,)
        self.values = column.values.to_numpy()

    def __getitem__(self, row: int) -> npt.NDArray[Any]:
        values: npt.NDArray[Any] = self.values[self.offsets[row] : self.offsets[row + 1]]
        return values


class _Part:
    """One record batch."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.n_tokens, self.sum_logps = (batch[name].to_numpy() for name in ("n_tokens", "sum_logp"))
        self.token_ids, self.token_logps = (_Lists(batch[name]) for name in ("token_ids", "token_logps"))


def _map_keys(path: Path) -> KeyArray:
    # An empty file cannot be mapped.
    return np.memmap(path, KEY, mode="r") if path.stat().st_size else np.empty(0, KEY)


def _build(folder: Path, reference: Reference) -> None:
    schema = pa.schema([LOGPS_SCHEMA.field(name) for name in (KEY_COLUMN, *COLUMNS)])
    with open(folder / KEYS, "xb") as keys, pa.ipc.new_file(str(folder / ROWS), schema) as rows:
        for table in reference.tables(COLUMNS):
            keys.write(key_array(table[KEY_COLUMN]).tobytes())
            rows.write_table(table.combine_chunks().cast(schema))
