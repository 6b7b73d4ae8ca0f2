"""What the workspace holds and nobody needs: journalled rows of no current pair, on request also whole folders."""

import shutil
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pyarrow as pa

from cache import CacheCorrupt, CacheIncomplete, KeySet
from cache.garbage import Compaction, compact_journal, drop_journal, find_journals, plan_compaction
from cache.manifest import read_manifest
from cache.spill import stored_key_set
from pipeline.data.tables import iter_responses, pair_sides
from pipeline.errors import RequestError, RunFailed
from pipeline.workspace import answers_folder, damaged_folder, journal_folder, sketch_journal_folder, views_folder

_BATCH_ROWS = 1 << 16


class Sweep(NamedTuple):
    """What was, or with dry_run would be, done: journals, and (folder, bytes, dropped) of other folders."""

    journals: list[Compaction]
    folders: list[tuple[Path, int, bool]]


def collect_garbage(
    *,
    pairs: Iterable[Path],
    reference: Path,
    sketches: Path,
    other_references: bool = False,
    damaged: bool = False,
    views: bool = False,
    answers: bool = False,
    dry_run: bool = False,
) -> Sweep:
    """Drop journalled rows that none of the prepared folders `pairs` uses; what is published is never touched.

    Journals of other references than the one published at `reference`, and of other sketches than those at `sketches`,
    stay whole, or go whole with other_references. damaged, views, answers: drop what `verify --repair` moved aside, the
    data loader's copies, and what evaluate and sample asked of models. dry_run: change nothing. Raises CacheLocked
    while a stage writes to one of the journals.
    """
    with TemporaryDirectory(prefix="refcache-") as scratch:
        needed = stored_key_set(chain.from_iterable(map(_used_keys, pairs)), Path(scratch))
        if not len(needed):
            raise RequestError(
                "The prepared folders hold no responses, so every journalled row would go. Nothing is done."
            )
        roots = [(journal_folder(), reference, "score", "--reference")]
        if find_journals(sketch_journal_folder()):
            roots.append((sketch_journal_folder(), sketches, "sketch", "--sketches"))
        if other_references:
            for _, folder, stage, option in roots:
                _require_readable(folder, stage, option)
        found = [
            done
            for root, folder, *_ in roots
            for done in _sweep(root, _published_id(folder), needed, other_references=other_references, dry_run=dry_run)
        ]
        folders = [(damaged_folder(), damaged), (views_folder(), views), (answers_folder(), answers)]
        return Sweep(
            found, [(path, _size(path), _drop(path, drop, dry_run)) for path, drop in folders if path.is_dir()]
        )


def _used_keys(pairs: Path) -> Iterator[pa.RecordBatch]:
    """The keys of the responses in a prepared folder and of its pairs' sides, some at a time."""
    for rows in iter_responses(pairs, ["response_key"], rows=_BATCH_ROWS):
        yield from rows.to_arrow().to_batches()
    yield from pair_sides(pairs)


def _require_readable(folder: Path, stage: str, option: str) -> None:
    if _published_id(folder) is None:
        raise RequestError(
            f"{folder} can't be read, so which journals are other references' is unknown. "
            f"Run `dvc repro {stage}` first, or name the published folder with {option}."
        )


def _sweep(
    root: Path, published: str | None, needed: KeySet, *, other_references: bool, dry_run: bool
) -> Iterator[Compaction]:
    """What is done to the journals under `root`; published: reference_id, or None where nothing can be read."""
    for journal in find_journals(root):
        if published in (None, journal.relative_to(root).parts[0]):
            yield plan_compaction(journal, needed) if dry_run else compact_journal(journal, needed)
        else:
            yield plan_compaction(journal, KeySet() if other_references else None)
            if other_references and not dry_run:
                drop_journal(journal)


def _published_id(reference: Path) -> str | None:
    try:
        return read_manifest(reference).reference_id
    except (CacheIncomplete, CacheCorrupt):
        return None


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _drop(folder: Path, drop: bool, dry_run: bool) -> bool:
    if drop and not dry_run:
        for journal in find_journals(folder):
            drop_journal(journal)  # unless it is being written
        try:
            shutil.rmtree(folder)
        except OSError as error:
            raise RunFailed(f"{folder} can't be removed: {error}. The journals were compacted.") from error
    return drop
