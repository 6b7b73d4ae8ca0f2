"""Rows as they are computed, kept outside DVC's outputs: what was appended survives a kill at any moment.

The file is a 12-byte header and then frames: magic, payload length, CRC-32 of the payload, payload (an Arrow IPC
stream). `append` returns after fsync, and from then on its rows are kept. What a crash can leave behind is a torn frame
at the end; it is cut off when the journal is next opened. A damaged frame with good frames after it can only come from
the disk: it is stepped over, its rows count as missing and are computed again, and everything else is kept. Refusing
the file, or cutting it there, would throw away rows that are provably intact.
"""

import logging
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa

from cache import lock
from cache.durable import sync_folder, write_durably
from cache.errors import CacheCorrupt, CacheError, CacheMismatch, system_errors
from cache.key_set import KeySet, key_array
from cache.schema import FORMAT_VERSION, KEY_COLUMN, LOGPS, Kind, conform
from cache.spill import PartitionRows, Spill

MAGIC = b"RCJOURNL"
HEADER = MAGIC + struct.pack("<I", FORMAT_VERSION)
FRAME_MAGIC = b"\xf1RCFRAME"
MAX_PAYLOAD = 1 << 30
FRAME = struct.Struct("<8sQI")  # magic, payload bytes, CRC-32 of the payload

log = logging.getLogger(__name__)


class Journal:
    """The append-only journal of one reference, `FOLDER/rows.journal`; a context manager that holds the write lock.

    Use one folder per reference_id. Entering raises CacheLocked when another process has it, CacheCorrupt when the
    file is no journal, CacheMismatch when a newer version wrote it.
    """

    def __init__(self, folder: Path, kind: Kind = LOGPS) -> None:
        self.path = folder / "rows.journal"
        self.kind = kind
        self._lock: int | None = None
        self._file: int | None = None
        self._frames: list[tuple[int, int]] = []  # (start, stop) in bytes of every intact frame

    def __enter__(self) -> Self:
        with system_errors(f"open the journal {self.path}", kept="Nothing was changed."):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = lock.acquire(self.path.parent / "lock")
            try:
                self._open()
            except BaseException:
                self.__exit__(None, None, None)
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file is not None:
            os.close(self._file)
        if self._lock is not None:
            lock.release(self._lock)
        self._file = self._lock = None

    def _open(self) -> None:
        if not self.path.exists():
            write_durably(self.path, HEADER)
            sync_folder(self.path.parent.parent)
        self._file = os.open(self.path, os.O_RDWR)
        require_header(self.path, os.pread(self._file, len(HEADER), 0))
        self._frames = list(find_frames(self._file))
        end = len(HEADER)
        for start, stop in self._frames:
            if start > end:
                message = "%s: bytes %d to %d are damaged; their rows will be computed again, all others are kept"
                log.warning(message, self.path, end, start)
            end = stop
        if end < os.fstat(self._file).st_size:
            os.ftruncate(self._file, end)
            os.fsync(self._file)

    @property
    def _end(self) -> int:
        return self._frames[-1][1] if self._frames else len(HEADER)

    def append(self, rows: pa.Table) -> None:
        """Add rows of the journal's kind; once this returns, they survive a kill or a power cut.

        A key that is there already may be appended again; readers take the first. Raises CacheError, with the journal
        as it was before, for rows that must not be stored and when the system refuses the write.
        """
        file = self._opened()
        rows = conform(rows, self.kind)
        self.kind.check(rows)
        payload = _to_ipc(rows)
        if len(payload) > MAX_PAYLOAD:
            raise ValueError(f"a batch of {len(payload)} bytes is too large for one frame; append fewer rows at a time")
        frame = FRAME.pack(FRAME_MAGIC, len(payload), zlib.crc32(payload)) + payload
        start = self._end
        kept = "The journal is intact: no row journalled before is lost."
        with system_errors(f"append to {self.path}", kept=kept):
            try:
                _write_all(file, frame, start)
                os.fsync(file)
            except OSError:
                os.ftruncate(file, start)
                raise
        self._frames.append((start, start + len(frame)))

    def tables(self) -> Iterator[pa.Table]:
        """The journalled rows, one table per appended batch, in order; of a repeated key only the first row."""
        seen = set[bytes]()
        for table in self.batches():
            yield _without_repeats(table, seen)

    def keys(self) -> set[bytes]:
        """The response keys of the journalled rows."""
        return set(self.key_set())

    def key_set(self) -> KeySet:
        """As `keys`, in 16 bytes of memory a row (and as much again while they are gathered)."""
        # Copied, or each would keep its whole frame in memory.
        found = [key_array(table[KEY_COLUMN]).copy() for table in self.key_tables()]
        return KeySet(np.concatenate([key_array(()), *found]))

    def key_tables(self) -> Iterator[pa.Table]:
        """The response keys of the journalled rows, one table per appended batch, repeated ones included."""
        file = self._opened()
        for start, stop in self._frames:
            yield key_table(os.pread(file, stop - start - FRAME.size, start + FRAME.size))

    def by_partition(self, keys: KeySet, bits: int, spill_to: Path) -> PartitionRows:
        """The rows of `keys` by partition, as cache.publish takes them; most of them wait in the folder."""
        spill = Spill(spill_to, bits)
        for rows in self.batches():
            wanted = keys.contains(key_array(rows[KEY_COLUMN]))
            spill.add(rows if wanted.all() else rows.filter(wanted))
        return lambda number, _: spill.take(number)

    def batches(self) -> Iterator[pa.Table]:
        """As `tables`, with the rows of repeated keys, and in memory that does not follow the rows."""
        file = self._opened()
        for start, stop in self._frames:
            yield conform(_from_ipc(os.pread(file, stop - start - FRAME.size, start + FRAME.size)), self.kind)

    def _opened(self) -> int:
        if self._file is None:
            raise RuntimeError(f"the journal {self.path} is not open; use it as `with Journal(folder) as journal:`")
        return self._file


def require_header(path: Path, found: bytes) -> None:
    """Raise CacheCorrupt unless `found` opens a journal, and CacheMismatch when a newer version wrote it."""
    # The header is renamed into place whole, so a partial one is never ours.
    if len(found) < len(HEADER) or not found.startswith(MAGIC):
        raise CacheCorrupt(f"{path} is no refcache journal. Move it away and run again; a new one will be started.")
    (version,) = struct.unpack_from("<I", found, len(MAGIC))
    if version > FORMAT_VERSION:
        raise CacheMismatch(
            f"{path} has format version {version}; this refcache knows up to {FORMAT_VERSION}. "
            "Upgrade refcache; nothing was changed."
        )


def find_frames(file: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of every intact frame, in bytes and in order; damaged stretches are stepped over."""
    size = os.fstat(file).st_size
    position = len(HEADER)
    while position + FRAME.size <= size:
        magic, length, checksum = FRAME.unpack(os.pread(file, FRAME.size, position))
        stop = position + FRAME.size + length
        if magic == FRAME_MAGIC and stop <= size and _crc(file, position + FRAME.size, stop) == checksum:
            yield position, stop
            position = stop
        else:
            position = _find_magic(file, position + 1, size)


CHUNK = 1 << 22  # bytes read at once, so that memory does not follow a corrupt length field


def _crc(file: int, start: int, stop: int) -> int:
    checksum = 0
    for position in range(start, stop, CHUNK):
        checksum = zlib.crc32(os.pread(file, min(CHUNK, stop - position), position), checksum)
    return checksum


def _find_magic(file: int, start: int, size: int) -> int:
    for position in range(start, size, CHUNK):
        # Overlap, or a magic that straddles two chunks would be missed.
        offset = os.pread(file, CHUNK + len(FRAME_MAGIC) - 1, position).find(FRAME_MAGIC)
        if offset >= 0:
            return position + offset
    return size


def _write_all(file: int, data: bytes, position: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, position)
        view, position = view[written:], position + written


def _to_ipc(rows: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(rows)
    return bytes(sink.getvalue())


def key_table(payload: bytes) -> pa.Table:
    """The keys of a frame, without decompressing its other columns."""
    return _from_ipc(payload, pa.ipc.IpcReadOptions(included_fields=[0]))  # keys come first


def _from_ipc(payload: bytes, options: pa.ipc.IpcReadOptions | None = None) -> pa.Table:
    try:
        return pa.ipc.open_stream(payload, options=options).read_all()
    except pa.ArrowInvalid as error:  # the CRC matched, so this was written by another program
        raise CacheError(f"a journal frame with a valid checksum is no Arrow stream: {error}") from error


def _without_repeats(table: pa.Table, seen: set[bytes]) -> pa.Table:
    first = []
    for key in table[KEY_COLUMN].to_pylist():
        first.append(key not in seen)
        seen.add(key)
    return table if all(first) else table.filter(pa.array(first))
