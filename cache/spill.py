"""Rows bucketed by the leading bits of their key, in temporary files: how what does not fit in memory is partitioned.

Keys are digests, so every batch holds keys of every partition: one pass distributes the rows, and then partition after
partition is read. A few megabytes stay in memory and touch no disk.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa

from cache.key_set import KEY, KeySet, key_array, key_column
from cache.schema import KEY_COLUMN
from cache.shards import partitions_of

# What a source of rows gives for a partition: (its number, the keys still wanted of it) to tables that hold the rows of
# those keys which the source has. They may hold others, and a key repeatedly: the first row counts.
PartitionRows = Callable[[int, KeySet], list[pa.Table]]

BUFFER_BYTES = 8 << 20  # of rows in memory before they are written
UNUSED, USED = "new-", "spill-"


@contextmanager
def spill_folder(scratch: Path) -> Iterator[Path]:
    """A new folder in `scratch`, removed afterwards, as are those that killed processes left behind."""
    scratch.mkdir(parents=True, exist_ok=True)
    for leftover in scratch.glob(USED + "*"):
        _remove_unless_used(leftover)
    folder = Path(tempfile.mkdtemp(prefix=UNUSED, dir=scratch))
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _locked(descriptor)
        # Locked before it gets the name under which others look for leftovers.
        folder = folder.rename(scratch / (USED + folder.name.removeprefix(UNUSED)))
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _remove_unless_used(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return
    if _locked(descriptor):
        shutil.rmtree(folder, ignore_errors=True)
    os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # in use, or on a network file system that cannot lock a folder
        return False
    return True


class Spill:
    """Tables of one schema in 2^bits buckets; `take` gives a bucket's rows in the order in which they were added."""

    def __init__(self, folder: Path, bits: int) -> None:
        self.folder, self.bits = folder, bits
        self._buffer: list[pa.Table] = []
        self._buffered = 0  # bytes
        self._spilled = False
        self._in_memory: _Bucketed | None = None

    def add(self, rows: pa.Table) -> None:
        """Add rows; the system's refusal to write them is an OSError."""
        if rows.num_rows:
            self._buffer.append(rows)
            self._buffered += rows.nbytes
        if self._buffered > BUFFER_BYTES:
            self._flush()

    def take(self, number: int) -> list[pa.Table]:
        """The rows of bucket `number`, as tables; asked once for each, after the last `add`."""
        if not self._spilled:
            if self._in_memory is None:
                self._in_memory, self._buffer = _Bucketed(self._buffer, self.bits), []
            return self._in_memory.take(number)
        self._flush()
        path = self._path(number)
        if not path.exists():
            return []
        with pa.memory_map(str(path)) as file:
            tables = []
            while file.tell() < file.size():
                tables.append(pa.ipc.open_stream(file).read_all())
        path.unlink()  # the tables keep its content
        return tables

    def _flush(self) -> None:
        if not self._buffer:
            return
        buckets = _Bucketed(self._buffer, self.bits)
        self._buffer, self._buffered, self._spilled = [], 0, True
        for number in range(1 << self.bits):
            for rows in buckets.take(number):
                self._append(number, rows)

    def _append(self, number: int, rows: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, rows.schema) as writer:
            writer.write_table(rows)
        # Opened anew each time: there may be more buckets than a process may have open files.
        with open(self._path(number), "ab") as file:
            file.write(sink.getvalue())

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.arrows"


class _Bucketed:
    """Rows in the order of their buckets; within a bucket they stay in the order they were in."""

    def __init__(self, tables: list[pa.Table], bits: int) -> None:
        self._rows = pa.concat_tables(tables).combine_chunks() if tables else None
        if self._rows is not None:
            numbers = partitions_of(key_array(self._rows[KEY_COLUMN]), bits)
            if bits:
                self._rows = self._rows.take(pa.array(np.argsort(numbers, kind="stable")))
            self._ends = np.cumsum(np.bincount(numbers, minlength=1 << bits))

    def take(self, number: int) -> list[pa.Table]:
        if self._rows is None:
            return []
        start, end = self._ends[number - 1] if number else 0, self._ends[number]
        return [self._rows.slice(start, end - start)] if start < end else []


GATHERED_KEYS = 1 << 18  # in memory before they are spilled, if there are more
KEY_BITS = 8  # buckets in which keys are sorted: at a thousand million of them, 63 MB at once


def stored_key_set(batches: Iterable[pa.RecordBatch | pa.Table], folder: Path) -> KeySet:
    """The keys in all columns of `batches`, as a mapped file in `folder`: its pages are not the process's own memory.

    folder: for these keys alone, made if need be. Raises OSError where the system refuses to write, ValueError for a
    null key.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spill, spilled = Spill(folder, KEY_BITS), False
    gathered, n_gathered = [key_array(())], 0
    for column in chain.from_iterable(batch.columns for batch in batches):
        gathered.append(key_array(column).copy())  # or it would keep the whole batch
        n_gathered += len(column)
        if n_gathered > GATHERED_KEYS:
            spill.add(pa.table({KEY_COLUMN: key_column(np.concatenate(gathered))}))
            gathered, n_gathered, spilled = [key_array(())], 0, True
    path = folder / "keys"
    with open(path, "wb") as file:
        if spilled:
            spill.add(pa.table({KEY_COLUMN: key_column(np.concatenate(gathered))}))
            for number in range(1 << KEY_BITS):
                found = [key_array(rows[KEY_COLUMN]) for rows in spill.take(number)]
                file.write(KeySet(np.concatenate([key_array(()), *found])).array.tobytes())
        else:
            file.write(KeySet(np.concatenate(gathered)).array.tobytes())
        if not file.tell():
            return KeySet()  # nothing can be mapped
    return KeySet.from_sorted(np.asarray(np.memmap(path, KEY, mode="r")))
