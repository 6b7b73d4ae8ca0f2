"""What the workspace holds and nobody needs: journalled rows of no current pair, on request also whole folders."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from cache import CacheCorrupt, CacheIncomplete
from cache.garbage import Compaction, compact_journal, drop_journal, find_journals, plan_compaction
from cache.manifest import read_manifest
from pipeline.errors import RequestError, RunFailed
from pipeline.prepared_data import read_pairs, read_responses
from pipeline.workspace import damaged_folder, journal_folder, views_folder


class Sweep(NamedTuple):
    """What was, or with dry_run would be, done: journals, and (folder, bytes, dropped) of other folders."""

    journals: list[Compaction]
    folders: list[tuple[Path, int, bool]]


def collect_garbage(
    *,
    pairs: Iterable[Path],
    reference: Path,
    other_references: bool = False,
    damaged: bool = False,
    views: bool = False,
    dry_run: bool = False,
) -> Sweep:
    """Drop journalled rows that none of the prepared folders `pairs` uses; what is published is never touched.

    Journals of other references than the one published at `reference` stay whole, or go whole with other_references.
    damaged, views: drop what `verify --repair` moved aside, and the data loader's copies. dry_run: change nothing.
    Raises CacheLocked while a scorer writes to one of the journals.
    """
    needed = set[bytes]()
    for folder in pairs:
        needed |= set(read_responses(folder)["response_key"])
        for side in ("chosen_key", "rejected_key"):
            needed |= set(read_pairs(folder)[side])
    if not needed:
        raise RequestError("The prepared folders hold no responses, so every journalled row would go. Nothing is done.")
    published = _published_id(reference)
    if other_references and published is None:
        raise RequestError(
            f"{reference} can't be read, so which journals are other references' is unknown. "
            "Run `dvc repro score` first, or name the published reference cache with --reference."
        )
    found = []
    for journal in find_journals(journal_folder()):
        if published in (None, journal.relative_to(journal_folder()).parts[0]):
            found.append(plan_compaction(journal, needed) if dry_run else compact_journal(journal, needed))
        else:
            found.append(plan_compaction(journal, set() if other_references else None))
            if other_references and not dry_run:
                drop_journal(journal)
    folders = [(damaged_folder(), damaged), (views_folder(), views)]
    return Sweep(found, [(path, _size(path), _drop(path, drop, dry_run)) for path, drop in folders if path.is_dir()])


def _published_id(reference: Path) -> str | None:
    try:
        return read_manifest(reference).reference_id
    except (CacheIncomplete, CacheCorrupt):
        return None


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _drop(folder: Path, drop: bool, dry_run: bool) -> bool:
    if drop and not dry_run:
        try:
            shutil.rmtree(folder)
        except OSError as error:
            raise RunFailed(f"{folder} can't be removed: {error}. The journals were compacted.") from error
    return drop
