"""What of a damaged reference cache can still be used, and moving the rest out of the way without deleting any of it.

A shard proves itself: its name holds the digest of its bytes, and its metadata says whose answers it holds. So sound
shards are found without the manifest, which may be the very file that is damaged.
"""

import os
import shutil
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cache.durable import PARTIAL, sync_folder
from cache.errors import CacheError, system_errors
from cache.identity import Identity, ReferenceIdentity, require_identity
from cache.manifest import EXCHANGE, MANIFEST, SHARD_NAME, Shard, file_digest, make_manifest, read_manifest
from cache.reference import Reference, StoredRows
from cache.schema import FORMAT_VERSION
from cache.shards import read_shard_metadata
from cache.verify import Finding, UnsoundShard, read_content, verify


def sound_part(folder: Path, identity: Identity) -> StoredRows | None:
    """The sound shards of this very reference in `folder`, or None where there are none.

    Every byte of them is read. Listed shards come first; others of the same reference (the manifest may be damaged, or
    an interrupted publication may have left them) count where their keys lie apart from those.
    """
    if not folder.is_dir():
        return None
    with system_errors(f"read {folder}", kept="Nothing was changed."):
        shards = _sound_shards(folder, identity)
    if not shards:
        return None
    manifest = make_manifest(identity.kind.name, identity.to_dict(), shards)
    if isinstance(identity, ReferenceIdentity):
        return Reference(folder, manifest, identity, intact=set(manifest.files))
    return StoredRows(folder, manifest, identity, intact=set(manifest.files))


def _sound_shards(folder: Path, identity: Identity) -> list[Shard]:
    listed = listed_shards(folder, identity)
    present = [path.name for path in folder.iterdir() if SHARD_NAME.fullmatch(path.name)]
    ranges: list[tuple[list[int], list[int]]] = []
    sound = []
    for name in sorted(present, key=lambda name: (name not in listed, name)):
        path = folder / name
        stated = _stated_by(path)
        if stated.get("reference_id") != identity.reference_id or stated.get("format_version") != FORMAT_VERSION:
            continue
        digest = file_digest(path)
        if not name.endswith(f"-{digest[:32]}.parquet"):
            continue
        try:
            content = read_content(path, identity.reference_id, identity.kind)
        except UnsoundShard:
            continue
        if not content.rows:
            continue
        first, last = content.ends.tolist()
        if any(first <= stop and start <= last for start, stop in ranges):
            continue
        ranges.append((first, last))
        size = path.stat().st_size
        sound.append(Shard(file=name, rows=content.rows, tokens=content.tokens, bytes=size, blake2b=digest))
    return sound


def listed_shards(folder: Path, identity: Identity) -> set[str]:
    """The names in the folder's manifest; empty where it can't be read or is another reference's."""
    try:
        manifest = read_manifest(folder)
    except CacheError:
        return set()
    return manifest.files if manifest.reference_id == identity.reference_id else set()


def _stated_by(shard: Path) -> dict[str, Any]:
    """What a shard says about itself; empty where it can't be read."""
    try:
        return read_shard_metadata(pq.read_schema(shard))
    except (OSError, pa.ArrowException, ValueError):  # ValueError: names in a damaged footer
        return {}


def damaged_files(folder: Path, identity: Identity) -> tuple[list[Finding], list[str]]:
    """What is wrong, and the names to move aside for it: damaged and foreign files, but no sound shard of `identity`.

    Raises CacheIncomplete and CacheMismatch as `verify` does, and CacheMismatch where the folder holds the answers of
    another reference: repairing it for this one would throw all of them out.
    """
    findings = verify(folder)
    if not findings:
        return [], []
    _require_same_reference(folder, identity)
    part = sound_part(folder, identity)
    names = {finding.file for finding in findings}
    if MANIFEST in names:  # verify looks no further then
        names |= {path.name for path in folder.glob("*.parquet")}
    names -= part.manifest.files if part else set()
    # The folder needs a manifest until the next publication replaces it; that also clears away its own leftovers.
    moved = (name for name in names if name not in (MANIFEST, EXCHANGE) and not name.endswith(PARTIAL))
    return findings, sorted(name for name in moved if os.path.lexists(folder / name))


def _require_same_reference(folder: Path, identity: Identity) -> None:
    shards = [_stated_by(path).get("identity") for path in sorted(folder.glob("*.parquet"))]
    try:
        manifest = read_manifest(folder).identity
    except CacheError:
        manifest = None
    wanted = identity.to_dict()
    if manifest == wanted or (wanted in shards and manifest not in shards):
        return
    others = [stated for stated in (manifest, *shards) if stated and stated != wanted]
    if others:
        require_identity(folder, type(identity).from_dict(others[0]), identity)


def set_aside(folder: Path, names: Iterable[str], damaged: Path) -> Path:
    """Move files of `folder` into a new folder under `damaged`, with a copy of the manifest; returns the new folder.

    damaged: path without the number that is appended to it. Raises CacheError where the system refuses.
    """
    with system_errors(f"move damaged files of {folder} to {damaged.parent}", kept="Nothing was deleted."):
        aside = _new_folder(damaged)
        shutil.copyfile(folder / MANIFEST, aside / MANIFEST)
        for name in names:
            shutil.move(folder / name, aside / name)
        sync_folder(aside)
        sync_folder(folder)
    return aside


def _new_folder(damaged: Path) -> Path:
    for number in count(1):
        aside = damaged.with_name(f"{damaged.name}-{number}")
        try:
            aside.mkdir(parents=True)
        except FileExistsError:
            continue
        return aside
    raise AssertionError("unreachable")
