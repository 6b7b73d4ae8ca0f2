"""Dropping journalled rows that nobody needs any more, and looking into journals without the right to write.

A journal is compacted by writing a new one in a folder beside it and renaming that over the old one: killed at any
moment, there is the old journal or the new one, and what was half-written is removed by the next compaction.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cache.durable import sync_folder
from cache.errors import system_errors
from cache.identity import IDENTITY
from cache.journal import FRAME, HEADER, Journal, find_frames, key_table, require_header
from cache.key_set import Keys, KeySet, key_array
from cache.schema import KEY_COLUMN, LOGPS, conform
from cache.sketches import kind_of_columns

BUILDING = "compacting"  # folder inside the journal's
FILE = "rows.journal"
FRAME_BYTES = 32 << 20  # of rows gathered before a frame is written; small batches share one, hence one fsync


@dataclass(frozen=True, kw_only=True)
class Compaction:
    """What compacting one journal keeps and drops: its folder, rows, and bytes of the file.

    Bytes are exact after a compaction and an estimate before one.
    """

    folder: Path
    kept_rows: int
    dropped_rows: int
    kept_bytes: int
    dropped_bytes: int


def peek_journal(folder: Path) -> Iterator[tuple[int, pa.Table]]:
    """(bytes of the frame, its rows) of the journal in `folder`, without locking or changing anything.

    Rows come as they were appended, repeated keys included; damaged frames are stepped over. A writer may be at work:
    what it appends meanwhile may or may not be seen. Nothing for a folder without a journal. Raises CacheCorrupt for a
    file that is no journal and CacheMismatch for one of a newer version.
    """
    for length, payload in _payloads(folder):
        rows = pa.ipc.open_stream(payload).read_all()
        yield length, conform(rows, kind_of_columns(rows.schema))


def _payloads(folder: Path) -> Iterator[tuple[int, bytes]]:
    with system_errors(f"read the journal {folder / FILE}", kept="Nothing was changed."):
        try:
            file = os.open(folder / FILE, os.O_RDONLY)
        except FileNotFoundError:
            return
        try:
            require_header(folder / FILE, os.pread(file, len(HEADER), 0))
            for start, stop in find_frames(file):
                yield stop - start, os.pread(file, stop - start - FRAME.size, start + FRAME.size)
        finally:
            os.close(file)


def journalled_keys(folder: Path) -> set[bytes]:
    """The response keys in the journal of `folder`; as `peek_journal`."""
    return {key for table in journalled_key_tables(folder) for key in table[KEY_COLUMN].to_pylist()}


def journalled_key_tables(folder: Path) -> Iterator[pa.Table]:
    """As `Journal.key_tables`, of the journal in `folder`; as `peek_journal`."""
    return (key_table(payload) for _, payload in _payloads(folder))


class _FirstOf:
    """Which rows of a journal, batch by batch, are the first of a needed key; needed None: all of them.

    Memory holds a byte for each needed key, and the keys where they are no KeySet yet.
    """

    def __init__(self, needed: "Keys | None") -> None:
        self._needed = needed if needed is None or isinstance(needed, KeySet) else KeySet(needed)
        self._seen = np.zeros(0 if self._needed is None else len(self._needed), np.bool_)

    def __call__(self, rows: pa.Table) -> npt.NDArray[np.bool_]:
        if self._needed is None:
            return np.ones(rows.num_rows, np.bool_)
        places = self._needed.positions(key_array(rows[KEY_COLUMN]))
        kept = places >= 0
        kept[kept] = ~self._seen[places[kept]]
        _, first = np.unique(places[kept], return_index=True)
        new = np.flatnonzero(kept)[first]
        self._seen[places[new]] = True
        kept[:] = False
        kept[new] = True
        return kept


def plan_compaction(folder: Path, needed: "Keys | None") -> Compaction:
    """What `compact_journal` would do; changes nothing, not even a lock file. needed None: what is there."""
    first_of = _FirstOf(needed)
    kept_rows = dropped_rows = 0
    dropped_bytes = 0.0
    for length, table in peek_journal(folder):
        kept = first_of(table)
        # What a row takes goes by its tokens; sketches are all of one size.
        parts = table["n_tokens"].to_numpy() if "n_tokens" in table.column_names else np.ones(table.num_rows)
        kept_rows += int(kept.sum())
        dropped_rows += int((~kept).sum())
        dropped_bytes += length * float(parts[~kept].sum()) / max(1.0, float(parts.sum()))
    whole = (folder / FILE).stat().st_size if (folder / FILE).exists() else 0
    dropped = round(dropped_bytes)
    return Compaction(
        folder=folder,
        kept_rows=kept_rows,
        dropped_rows=dropped_rows,
        kept_bytes=whole - dropped,
        dropped_bytes=dropped,
    )


def compact_journal(folder: Path, needed: Keys) -> Compaction:
    """Drop the rows of the journal in `folder` whose keys are not in `needed`, and rows that repeat a key.

    Every other row stays, bit for bit. Raises CacheLocked while another process writes there, and CacheError, with the
    journal as it was, where the system refuses (rewriting needs space for the rows that stay).
    """
    kind = next((kind_of_columns(rows.schema) for _, rows in peek_journal(folder)), LOGPS)
    with Journal(folder, kind) as journal:
        building = folder / BUILDING
        shutil.rmtree(building, ignore_errors=True)
        planned = plan_compaction(folder, needed)
        if not planned.dropped_rows:
            return planned
        try:
            kept = _copy(journal, needed, building)
            with system_errors(f"replace {journal.path}", kept="The journal is intact."):
                old, new = journal.path.stat().st_size, (building / FILE).stat().st_size
                os.replace(building / FILE, journal.path)
                sync_folder(folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    dropped = planned.kept_rows + planned.dropped_rows - kept
    return Compaction(
        folder=folder, kept_rows=kept, dropped_rows=dropped, kept_bytes=new, dropped_bytes=max(old - new, 0)
    )


def _copy(journal: Journal, needed: Keys, building: Path) -> int:
    empty = journal.kind.schema.empty_table()
    gathered, rows, first_of = [empty], 0, _FirstOf(needed)
    with Journal(building, journal.kind) as copy:
        for table in journal.batches():
            wanted = table.filter(pa.array(first_of(table)))
            rows += wanted.num_rows
            gathered.append(wanted)
            if sum(part.nbytes for part in gathered) > FRAME_BYTES:
                copy.append(pa.concat_tables(gathered))
                gathered = [empty]
        if any(part.num_rows for part in gathered):
            copy.append(pa.concat_tables(gathered))
    return rows


def drop_journal(folder: Path) -> None:
    """Remove the journal in `folder`, but not its lock file: a waiter would lock a ghost. Raises CacheLocked."""
    with Journal(folder) as journal, system_errors(f"remove {journal.path}", kept="Other journals are as they were."):
        journal.path.unlink()
        (folder / IDENTITY).unlink(missing_ok=True)
        sync_folder(folder)


def find_journals(journals: Path) -> list[Path]:
    """Folders under `journals` that hold a journal, those inside another one's folder included, in order of name."""
    found = {path.parent for path in journals.rglob(FILE)} if journals.is_dir() else set()
    return sorted(folder for folder in found if folder.name != BUILDING)
