"""Opening a published reference cache: whole, of the expected reference, and with nothing in it that is not its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from cache.errors import CacheCorrupt, CacheMismatch, system_errors
from cache.identity import SomeIdentity, require_identity
from cache.manifest import EXCHANGE, Manifest, Shard, is_remote, read_manifest, remedy, require_no_strays
from cache.remote import RemoteFolder, remote_folder
from cache.shards import partition_bits, require_same_reference

ATTEMPTS = 20  # to find the folder between two publications
REMOTE_ATTEMPTS = 2  # each takes a while


class Opened(NamedTuple, Generic[SomeIdentity]):
    """What was found; `path` is where the shards are read: the folder, or that of copies of `remote`."""

    path: Path
    manifest: Manifest
    identity: SomeIdentity
    remote: RemoteFolder | None


def published_kind(path: Path | str) -> str:
    """The kind that the manifest in folder or at address `path` states; raises as cache.open_reference."""
    return (remote_folder(path).manifest("score") if is_remote(path) else read_manifest(Path(path))).kind


def open_rows(
    path: Path | str,
    kind: str,
    stage: str,
    parse: Callable[[dict[str, Any]], SomeIdentity],
    expect: SomeIdentity | None,
    copies: Path | None,
) -> Opened[SomeIdentity]:
    """What `open_reference` does, for rows of any kind. parse: the manifest's identity to its class."""
    remote = remote_folder(path, copies) if is_remote(path) else None
    folder = Path(path)

    def look() -> Opened[SomeIdentity]:
        manifest = read_manifest(folder, stage) if remote is None else remote.manifest(stage)
        place = folder if remote is None else remote
        if manifest.kind != kind:
            raise CacheMismatch(f"{place} is a reference cache of kind {manifest.kind!r}, expected {kind!r}.")
        identity = parse(manifest.identity)
        if expect is not None:
            require_identity(place, identity, expect)
        if remote is not None:
            remote.require_listed(manifest, partition_bits(manifest.n_rows, identity.kind.shard_rows))
            return Opened(remote.copy_of(manifest), manifest, identity, remote)
        for shard in manifest.shards:
            _require_shard(folder, shard, manifest, remedy(folder, stage))
        names = (file.name for file in folder.glob("*.parquet"))
        require_no_strays(folder, names, manifest, (folder / EXCHANGE).read_bytes)
        return Opened(folder, manifest, identity, None)

    for remaining in reversed(range(ATTEMPTS if remote is None else REMOTE_ATTEMPTS)):
        try:
            with system_errors(f"read {remote or folder}", kept="Nothing was changed."):
                return look()
        except CacheCorrupt:
            # A publication may have passed between two looks at the folder; real damage is still there next time.
            if not remaining:
                raise
    raise AssertionError("unreachable")


def _require_shard(folder: Path, shard: Shard, manifest: Manifest, remedy: str) -> None:
    path = folder / shard.file
    try:
        size = path.stat().st_size
        if size != shard.bytes:
            raise CacheCorrupt(f"{path} has {size} bytes, expected {shard.bytes}. {remedy}")
        schema = pq.read_schema(path)
    except FileNotFoundError:
        raise CacheCorrupt(f"{path} is listed in the manifest but missing. {remedy}") from None
    except (OSError, pa.ArrowException, ValueError) as error:  # ValueError: pyarrow decodes names in a damaged footer
        raise CacheCorrupt(f"{path} is no readable Parquet file: {error}. {remedy}") from error
    require_same_reference(path, schema, manifest, remedy)
