"""Rows become immutable shards: the same rows give the same files, whatever their order and whatever was there before.

A shard is named by the digest of its own bytes, so a file of that name never changes meaning. The order of steps makes
every crash harmless: new shards are written under names that no reader looks at; `publishing.json` announces the
exchange; shards get their names; the manifest is replaced, which is the moment of publication; shards that are no
longer listed go; `publishing.json` goes.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from cache.durable import PARTIAL, sync_folder, write_durably
from cache.errors import CacheIncomplete, CacheLocked, system_errors
from cache.identity import Identity
from cache.key_set import KeySet, key_array
from cache.lock import holder_of
from cache.manifest import EXCHANGE, MANIFEST, SHARD_NAME, Manifest, Shard, file_digest, make_manifest, manifest_bytes
from cache.schema import KEY_COLUMN, Kind, conform
from cache.shards import partition_bits, partitions, write_shard
from cache.spill import PartitionRows, spill_folder, stored_key_set


def publish_reference(folder: Path, rows: pa.Table, identity: Identity) -> Manifest:
    """Make `folder` a reference cache of exactly `rows` (of the identity's kind, any order) and return its manifest.

    Files that are no shards (drift.json) are left alone. Raises CacheError for rows that must not be stored or when the
    system refuses, CacheLocked when another process is publishing here, ValueError for a repeated key; the folder then
    holds what it held before.
    """
    kind = identity.kind
    parts = partitions(conform(rows, kind), kind.shard_rows)
    return publish_partitions(folder, parts, kind=kind, identity=identity.to_dict())


class RowSource(Protocol):
    """Where rows to publish come from: a Journal, or a Reference."""

    def by_partition(self, keys: KeySet, bits: int, spill_to: Path) -> PartitionRows:
        """Its rows of `keys` by partition (leading `bits` bits of the key); `spill_to` is a folder for its own use."""


def publish_rows(
    folder: Path,
    keys: KeySet | Iterable[pa.RecordBatch],
    sources: Sequence[RowSource],
    identity: Identity,
    *,
    scratch: Path,
) -> Manifest:
    """Make `folder` a reference cache of exactly the rows of `keys`, each from the first of `sources` that has it.

    As `publish_reference`, with one partition in memory at a time (up to SHARD_ROWS rows); rows of journals wait in
    temporary files in `scratch`. keys: a set takes 16 bytes a key of memory; batches, all of whose columns are keys
    (`key_batches`), wait in temporary files too. Raises CacheIncomplete where no source has a row.
    """
    with _publishing(folder), spill_folder(scratch) as spill:
        wanted = keys if isinstance(keys, KeySet) else stored_key_set(keys, spill)
        parts = _gather(wanted, sources, spill, identity.kind)
        return publish_partitions(folder, parts, kind=identity.kind, identity=identity.to_dict())


def _gather(keys: KeySet, sources: Sequence[RowSource], spill: Path, kind: Kind) -> Iterator[tuple[int, pa.Table]]:
    bits = partition_bits(len(keys), kind.shard_rows)
    readers = []
    for number, source in enumerate(sources):
        own = spill / str(number)
        own.mkdir()
        readers.append(source.by_partition(keys, bits, own))
    for number in range(1 << bits):
        wanted, tables = keys.partition(number, bits), []
        for rows_of in readers:
            rows = _first_rows(rows_of(number, wanted), wanted, kind)
            if rows.num_rows:
                wanted -= KeySet(rows[KEY_COLUMN])
                tables.append(rows)
        if len(wanted):
            first = ", ".join(key.hex() for key, _ in zip(wanted, range(3), strict=False))
            raise CacheIncomplete(
                f"{len(wanted)} rows of partition {number} are in none of {len(sources)} sources: {first}. "
                f"What was published before is intact. Run `dvc repro {kind.stage}`; only what is missing is computed."
            )
        if tables:
            yield number, pa.concat_tables(tables)


def _first_rows(tables: list[pa.Table], wanted: KeySet, kind: Kind) -> pa.Table:
    """The first row of each key of `wanted` that `tables` have."""
    rows = pa.concat_tables([kind.schema.empty_table(), *tables])
    positions = wanted.positions(key_array(rows[KEY_COLUMN]))
    present = np.flatnonzero(positions >= 0)
    _, first = np.unique(positions[present], return_index=True)
    return rows.take(pa.array(present[first]))


def publish_partitions(
    folder: Path, parts: Iterable[tuple[int, pa.Table]], *, kind: Kind, identity: dict[str, Any]
) -> Manifest:
    """`publish_reference` for partitions that come one at a time (see cache.shards), so that memory holds only one."""
    with _publishing(folder):
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


def _publishing(folder: Path) -> AbstractContextManager[None]:
    return system_errors(f"publish to {folder}", kept="What was published before is intact, and so is the journal.")


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
