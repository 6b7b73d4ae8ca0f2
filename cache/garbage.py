"""Dropping journalled rows that nobody needs any more, and looking into journals without the right to write.

A journal is compacted by writing a new one in a folder beside it and renaming that over the old one: killed at any
moment, there is the old journal or the new one, and what was half-written is removed by the next compaction.
"""

import os
import shutil
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from cache.durable import sync_folder
from cache.errors import system_errors
from cache.identity import IDENTITY
from cache.journal import FRAME, HEADER, Journal, find_frames, require_header
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
    with system_errors(f"read the journal {folder / FILE}", kept="Nothing was changed."):
        try:
            file = os.open(folder / FILE, os.O_RDONLY)
        except FileNotFoundError:
            return
        try:
            require_header(folder / FILE, os.pread(file, len(HEADER), 0))
            for start, stop in find_frames(file):
                payload = os.pread(file, stop - start - FRAME.size, start + FRAME.size)
                rows = pa.ipc.open_stream(payload).read_all()
                yield stop - start, conform(rows, kind_of_columns(rows.schema))
        finally:
            os.close(file)


def journalled_keys(folder: Path) -> set[bytes]:
    """The response keys in the journal of `folder`; as `peek_journal`."""
    return {key for _, rows in peek_journal(folder) for key in rows[KEY_COLUMN].to_pylist()}


def plan_compaction(folder: Path, needed: Set[bytes] | None) -> Compaction:
    """What `compact_journal` would do; changes nothing, not even a lock file. needed None: what is there."""
    seen: set[bytes] = set()
    rows = {True: 0, False: 0}
    size = {True: 0.0, False: 0.0}
    for length, table in peek_journal(folder):
        # What a row takes goes by its tokens; sketches are all of one size.
        parts = table["n_tokens"].to_pylist() if "n_tokens" in table.column_names else [1] * table.num_rows
        for key, part in zip(table[KEY_COLUMN].to_pylist(), parts, strict=True):
            kept = needed is None or (key in needed and key not in seen)
            seen.add(key)
            rows[kept] += 1
            size[kept] += length * part / sum(parts)
    whole = (folder / FILE).stat().st_size if (folder / FILE).exists() else 0
    dropped = round(size[False])
    return Compaction(
        folder=folder,
        kept_rows=rows[True],
        dropped_rows=rows[False],
        kept_bytes=whole - dropped,
        dropped_bytes=dropped,
    )


def compact_journal(folder: Path, needed: Set[bytes]) -> Compaction:
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


def _copy(journal: Journal, needed: Set[bytes], building: Path) -> int:
    empty = journal.kind.schema.empty_table()
    gathered, rows = [empty], 0
    with Journal(building, journal.kind) as copy:
        for table in journal.tables():
            wanted = table.filter(pa.array([key in needed for key in table[KEY_COLUMN].to_pylist()], pa.bool_()))
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
