"""Rows become immutable shards: the same rows give the same files, whatever their order and whatever was there before.

A shard is named by the digest of its own bytes, so a file of that name never changes meaning. The order of steps makes
every crash harmless: new shards are written under names that no reader looks at; `publishing.json` announces the
exchange; shards get their names; the manifest is replaced, which is the moment of publication; shards that are no
longer listed go; `publishing.json` goes.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from cache.durable import PARTIAL, sync_folder, write_durably
from cache.errors import CacheLocked, system_errors
from cache.identity import ReferenceIdentity
from cache.lock import holder_of
from cache.manifest import EXCHANGE, MANIFEST, SHARD_NAME, Manifest, Shard, file_digest, make_manifest, manifest_bytes
from cache.schema import LOGPS, Kind, conform
from cache.shards import partitions, write_shard


def publish_reference(folder: Path, rows: pa.Table, identity: ReferenceIdentity) -> Manifest:
    """Make `folder` a reference cache of exactly `rows` (columns of LOGPS_SCHEMA, any order) and return its manifest.

    Files that are no shards (drift.json) are left alone. Raises CacheError for rows that must not be stored or when the
    system refuses, CacheLocked when another process is publishing here, ValueError for a repeated key; the folder then
    holds what it held before.
    """
    return publish_partitions(folder, partitions(conform(rows, LOGPS)), kind=LOGPS, identity=identity.to_dict())


def publish_partitions(
    folder: Path, parts: Iterable[tuple[int, pa.Table]], *, kind: Kind, identity: dict[str, Any]
) -> Manifest:
    """`publish_reference` for partitions that come one at a time (see cache.shards), so that memory holds only one."""
    with system_errors(f"publish to {folder}", kept="What was published before is intact, and so is the journal."):
        folder.mkdir(parents=True, exist_ok=True)
        with _sole_publisher(folder):
            _remove_partial(folder)
            try:
                written = [write_shard(folder, number, part, kind, identity) for number, part in parts]
                manifest = make_manifest(kind.name, identity, [shard for _, shard in written])
                _exchange(folder, written, manifest)
            finally:
                _remove_partial(folder)
    return manifest


def _exchange(folder: Path, written: list[tuple[Path, Shard]], manifest: Manifest) -> None:
    present = {path.name for path in folder.iterdir() if SHARD_NAME.fullmatch(path.name)}
    new = [(partial, shard) for partial, shard in written if not _is_intact(folder / shard.file, shard)]
    old = present - manifest.files
    if new or old:
        names = json.dumps({"shards": sorted(present | manifest.files)}, indent=2) + "\n"
        write_durably(folder / EXCHANGE, names.encode())
    for partial, shard in new:
        os.replace(partial, folder / shard.file)
    sync_folder(folder)
    content, path = manifest_bytes(manifest), folder / MANIFEST
    if not path.exists() or path.read_bytes() != content:
        write_durably(path, content)
    for name in sorted(old):
        (folder / name).unlink()
    sync_folder(folder)
    (folder / EXCHANGE).unlink(missing_ok=True)
    sync_folder(folder)


def _is_intact(path: Path, shard: Shard) -> bool:
    # Hashed, not merely found: publishing again is how a damaged shard is mended.
    return path.exists() and path.stat().st_size == shard.bytes and file_digest(path) == shard.blake2b


def _remove_partial(folder: Path) -> None:
    for path in folder.glob("*" + PARTIAL):
        path.unlink()


@contextmanager
def _sole_publisher(folder: Path) -> Iterator[None]:
    """Lock the folder itself, since a lock file inside would become part of DVC's output."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CacheLocked(
                f"{folder} is being published by {holder_of(descriptor)}. Wait for it, or end that process (a killed "
                "`dvc` can leave its stage running), and run again."
            ) from None
        except OSError:
            pass  # some network file systems cannot lock a folder; the journal's lock still stands
        yield
    finally:
        os.close(descriptor)
