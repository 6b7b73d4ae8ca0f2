"""`manifest.json`: what a published reference cache consists of. It is written last, so its presence means complete."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cache.errors import CacheCorrupt, CacheIncomplete, CacheMismatch
from cache.identity import identity_digest
from cache.schema import FORMAT_VERSION

MANIFEST = "manifest.json"
# Exists only while shards are being exchanged: the names that a reader may find besides those of the manifest.
EXCHANGE = "publishing.json"
SHARD_NAME = re.compile(r"[a-z]+-\d{5}-[0-9a-f]{32}\.parquet")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One Parquet file of the reference cache; `blake2b` is the 32-byte digest of the file, 64 hex characters."""

    file: str
    rows: int
    tokens: int
    bytes: int
    blake2b: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The parsed manifest; `identity` is kept as written (see ReferenceIdentity.from_dict)."""

    format_version: int
    kind: str
    identity: dict[str, Any]
    reference_id: str
    n_rows: int
    n_tokens: int
    shards: tuple[Shard, ...]

    @property
    def files(self) -> set[str]:
        return {shard.file for shard in self.shards}


def make_manifest(kind: str, identity: dict[str, Any], shards: list[Shard]) -> Manifest:
    return Manifest(
        format_version=FORMAT_VERSION,
        kind=kind,
        identity=identity,
        reference_id=identity_digest(identity),
        n_rows=sum(shard.rows for shard in shards),
        n_tokens=sum(shard.tokens for shard in shards),
        shards=tuple(sorted(shards, key=lambda shard: shard.file)),
    )


def manifest_bytes(manifest: Manifest) -> bytes:
    """The content of manifest.json; equal manifests give equal bytes."""
    return (json.dumps(asdict(manifest), indent=2, sort_keys=True, ensure_ascii=True) + "\n").encode()


def read_manifest(folder: Path, stage: str = "score") -> Manifest:
    """The manifest of a published reference cache. stage: which one should have written it, for messages.

    Raises CacheIncomplete when there is none, CacheMismatch when a newer version wrote it, CacheCorrupt otherwise.
    """
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        found = f"has no {MANIFEST}" if folder.is_dir() else "is a file" if folder.exists() else "does not exist"
        raise CacheIncomplete(
            f"{folder} is no published reference cache: it {found}. Expected a folder with {MANIFEST} and *.parquet "
            f"shards, as `dvc repro {stage}` writes it (what an interrupted run has computed is reused)."
        ) from None
    except ValueError as error:
        raise CacheCorrupt(f"{path} is not JSON ({error}). {remedy(folder, stage)}") from None
    return _parse(folder, path, data, stage)


def remedy(folder: Path, stage: str = "score") -> str:
    """What to run when files of a published reference cache are damaged or gone. stage: which one wrote it."""
    return (
        f"Restore the folder with `dvc checkout {folder}`, or run `refcache verify {folder} --repair` (or "
        f"`dvc repro -f {stage}`): only the rows of damaged shards that the journal lacks are computed again."
    )


def _parse(folder: Path, path: Path, data: Any, stage: str) -> Manifest:
    version = data.get("format_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CacheMismatch(
            f"{path} has format version {version}; this refcache reads up to {FORMAT_VERSION}. "
            f"It was written by a newer refcache: upgrade, or run `dvc repro -f {stage}` to write it with this one."
        )
    try:
        shards = tuple(_parse_shard(entry) for entry in data["shards"])
        manifest = Manifest(**(data | {"shards": shards}))
        computed = make_manifest(manifest.kind, dict(manifest.identity), list(shards))
    except (TypeError, KeyError, ValueError) as error:
        problem = f"is no manifest of format version {FORMAT_VERSION} ({error})"
        raise CacheCorrupt(f"{path} {problem}. {remedy(folder, stage)}") from None
    if manifest != computed:
        wrong = [name for name, value in asdict(manifest).items() if value != asdict(computed)[name]]
        problem = f"contradicts itself: {', '.join(wrong)} do not follow from its identity and shards"
        raise CacheCorrupt(f"{path} {problem}. {remedy(folder, stage)}")
    return manifest


def _parse_shard(entry: dict[str, Any]) -> Shard:
    shard = Shard(**entry)
    # A name is joined to the folder's path and opened, so it must not lead elsewhere.
    if not isinstance(shard.file, str) or not SHARD_NAME.fullmatch(shard.file):
        raise TypeError(f"shard file name {shard.file!r}")
    if not all(isinstance(number, int) and number >= 0 for number in (shard.rows, shard.tokens, shard.bytes)):
        raise TypeError(f"rows, tokens and bytes of {shard.file} must be whole numbers")
    return shard


def file_digest(path: Path) -> str:
    """BLAKE2b with 32 bytes of a file's content, as 64 hex characters (`b2sum -l 256 FILE` prints the same)."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()
