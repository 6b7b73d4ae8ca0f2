"""`manifest.json`: what a published reference cache consists of. It is written last, so its presence means complete."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cache.errors import CacheCorrupt, CacheIncomplete, CacheMismatch
from cache.identity import identity_digest
from cache.schema import FORMAT_VERSION

MANIFEST = "manifest.json"
# Exists only while shards are being exchanged: the names that a reader may find besides those of the manifest.
EXCHANGE = "publishing.json"
URL = re.compile(r"([a-z][a-z0-9]+):/{1,2}(.*)")  # pathlib makes one slash of two
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
    try:
        data = (folder / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        found = f"has no {MANIFEST}" if folder.is_dir() else "is a file" if folder.exists() else "does not exist"
        raise CacheIncomplete(
            f"{folder} is no published reference cache: it {found}. Expected a folder with {MANIFEST} and *.parquet "
            f"shards, as `dvc repro {stage}` writes it (what an interrupted run has computed is reused)."
        ) from None
    return parse_manifest(folder, data, stage)


def is_remote(path: object) -> bool:
    """Whether `path` is an address in object storage, such as s3://BUCKET/PATH, rather than a folder."""
    return URL.fullmatch(str(path)) is not None


def remedy(folder: object, stage: str = "score") -> str:
    """What to run when files of a published reference cache are damaged or gone. stage: which one wrote it."""
    if is_remote(folder):
        return "Copy the published folder to a new address, manifest.json last (docs/sharing.md)."
    return (
        f"Restore the folder with `dvc checkout {folder}`, or run `refcache verify {folder} --repair` (or "
        f"`dvc repro -f {stage}`): only the rows of damaged shards that the journal lacks are computed again."
    )


def parse_manifest(folder: object, content: bytes, stage: str) -> Manifest:
    """The manifest whose bytes are `content`, of `folder`, a name for messages; otherwise as `read_manifest`."""
    path = f"{folder}/{MANIFEST}"
    try:
        data = json.loads(content)
    except ValueError as error:
        raise CacheCorrupt(f"{path} is not JSON ({error}). {remedy(folder, stage)}") from None
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


def require_no_strays(
    folder: object, present: Iterable[str], manifest: Manifest, exchange: Callable[[], bytes]
) -> None:
    """Raise CacheCorrupt for *.parquet that neither the manifest nor a publication under way accounts for.

    present: the names of the folder's files; exchange: reads EXCHANGE, or raises FileNotFoundError.
    """
    try:
        exchanged = json.loads(exchange())["shards"]
    except FileNotFoundError:
        exchanged = []
    strays = sorted({name for name in present if name.endswith(".parquet")} - manifest.files - set(exchanged))
    if strays:
        repair = f"run `refcache verify {folder} --repair`, which does."
        mend = "copy what is published to a new address (docs/sharing.md)." if is_remote(folder) else repair
        raise CacheCorrupt(
            f"{folder} holds {', '.join(strays)}, which {'is' if len(strays) == 1 else 'are'} not in its manifest; "
            f"whoever scans the folder would read foreign rows. Move such files away, or {mend}"
        )


def file_digest(path: Path) -> str:
    """BLAKE2b with 32 bytes of a file's content, as 64 hex characters (`b2sum -l 256 FILE` prints the same)."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()
