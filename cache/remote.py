"""A published reference cache in object storage, read in place: s3:// and gs:// by pyarrow's file systems.

Opening reads the manifest and a listing. A shard is fetched whole when the first row of it is asked for, its digest
checked, and kept in a folder of its own publication; what is read is always that checked copy. Credentials, region and
endpoint come from where other tools of the storage take them (docs/sharing.md).
"""

import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import textwrap
import threading
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from cache.durable import partial_of, write_durably
from cache.errors import CacheCorrupt, CacheError, CacheIncomplete, system_errors
from cache.key_set import KeyArray, KeySet
from cache.manifest import (
    EXCHANGE,
    MANIFEST,
    URL,
    Manifest,
    Shard,
    file_digest,
    manifest_bytes,
    parse_manifest,
    remedy,
    require_no_strays,
)
from cache.shards import partitions_of, require_same_reference

KEPT_BYTES = 10 << 30  # of copies of other publications, beside the one that is read
CHUNK = 8 << 20
CONNECTS_WITHIN = 3  # seconds
SILENT_FOR = 5  # seconds without a byte, after which a request has failed
ATTEMPTS = 2  # of each request, by the storage's own library


@dataclass(frozen=True)
class RemoteFolder:
    """A folder in object storage. Make it with `remote_folder`."""

    url: str
    root: str  # BUCKET/PATH, as `system` names it
    copies: Path  # fetched shards, a folder for each publication
    system: Any = field(repr=False, compare=False)  # a pyarrow.fs.FileSystem

    def __str__(self) -> str:
        return self.url

    def manifest(self, stage: str) -> Manifest:
        """As cache.manifest.read_manifest."""
        return parse_manifest(self.url, self._manifest(), stage)

    def require_listed(self, manifest: Manifest, bits: int) -> None:
        """Raise CacheCorrupt unless a listing shows exactly the manifest's shards with their sizes, 2^bits at most."""
        with storage_errors(self.url):
            entries = self.system.get_file_info(fs.FileSelector(self.root))
        sizes = {entry.base_name: entry.size for entry in entries if entry.type == fs.FileType.File}
        advice = remedy(self.url)
        for shard in manifest.shards:
            if sizes.get(shard.file) != shard.bytes:
                found = (
                    f"has {sizes[shard.file]} bytes, expected {shard.bytes}" if shard.file in sizes else "is missing"
                )
                raise CacheCorrupt(f"{self.url}/{shard.file} {found}. {advice}")
            if partition_of(shard) >= 1 << bits:
                raise CacheCorrupt(f"{self.url}/{shard.file} names a partition of {1 << bits}. {advice}")
        require_no_strays(self.url, sizes, manifest, lambda: self._exchange(sizes))

    def require_own(
        self, shard: Shard, schema: pa.Schema, keys: Iterable[KeyArray], manifest: Manifest, bits: int
    ) -> None:
        """Raise unless a fetched shard is of the manifest's reference and holds keys of its partition, of 2^bits."""
        require_same_reference(f"{self.url}/{shard.file}", schema, manifest, remedy(self.url))
        if any((partitions_of(some, bits) != partition_of(shard)).any() for some in keys):
            raise CacheCorrupt(f"{self.url}/{shard.file} holds keys of another partition. {remedy(self.url)}")

    def holding(self, wanted: KeySet, manifest: Manifest, bits: int) -> list[Shard]:
        """The shards whose partitions, of 2^bits, some of the keys are in."""
        return [shard for shard in manifest.shards if len(wanted.partition(partition_of(shard), bits))]

    def copy_of(self, manifest: Manifest) -> Path:
        """The folder for copies of this publication's shards, locked against removal until this process ends."""
        folder = self.copies / hashlib.blake2b(manifest_bytes(manifest), digest_size=16).hexdigest()
        with system_errors(f"keep copies of {self.url} in {self.copies}", kept="Nothing was fetched."):
            _hold(folder)
        return folder

    def fetch(self, shard: Shard, folder: Path) -> str:
        """Have a sound copy of `shard` in `folder`; returns its digest, which differs if the storage's is damaged.

        Raises FileNotFoundError where the storage has none, CacheError where it can't be reached.
        """
        path = folder / shard.file
        kept = "What was fetched before is kept."
        with system_errors(f"read the copy {path}", kept=kept):
            if path.exists() and (digest := file_digest(path)) == shard.blake2b:
                return digest
        hashed = hashlib.blake2b(digest_size=32)
        # Several threads and processes may fetch the same shard: each has a name of its own until its copy is whole.
        partial = partial_of(path.with_suffix(f".{os.getpid()}-{threading.get_ident()}"))
        with self._opened(shard.file) as source, system_errors(f"keep a copy of {shard.file} in {folder}", kept=kept):
            try:
                with open(partial, "xb") as copy:
                    while chunk := _read(self.url, source):
                        hashed.update(chunk)
                        copy.write(chunk)
                if hashed.hexdigest() == shard.blake2b:
                    os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
        return hashed.hexdigest()

    def fetch_companion(self, name: str, folder: Path) -> None:
        """Have in `folder` what stands beside the shards as `name` now, or nothing where there is nothing."""
        try:
            write_durably(folder / name, self._bytes(name))
        except FileNotFoundError:
            (folder / name).unlink(missing_ok=True)

    def _exchange(self, present: Container[str]) -> bytes:
        if EXCHANGE not in present:  # saves asking
            raise FileNotFoundError
        return self._bytes(EXCHANGE)

    def _manifest(self) -> bytes:
        try:
            return self._bytes(MANIFEST)
        except FileNotFoundError:
            with suppress(FileNotFoundError), storage_errors(self.url):  # which says so where there is no bucket
                self.system.get_file_info(fs.FileSelector(self.root))
            raise CacheIncomplete(
                f"{self.url} is no published reference cache: it has no {MANIFEST}. Expected the files of a folder as "
                "`dvc repro score` writes it, copied there (docs/sharing.md; a DVC remote is not laid out like that)."
            ) from None

    def _bytes(self, name: str) -> bytes:
        with self._opened(name) as file:
            return b"".join(iter(lambda: _read(self.url, file), b""))

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        with storage_errors(self.url):
            file = self.system.open_input_stream(f"{self.root}/{name}")
        try:
            yield file
        finally:
            file.close()


def _read(url: str, file: Any) -> bytes:
    with storage_errors(url):
        chunk: bytes = file.read(CHUNK)
    return chunk


def partition_of(shard: Shard) -> int:
    """The number in a shard's name."""
    return int(shard.file.split("-")[1])


def remote_folder(path: Path | str, copies: Path | None = None) -> RemoteFolder:
    """The folder at an address such as s3://BUCKET/PATH; nothing is asked yet, but an unset region.

    copies: where fetched shards are kept for later processes too; None: a temporary folder until this process ends.
    Raises CacheError for a kind of storage that is not known, or that can't be reached.
    """
    found = URL.fullmatch(str(path))
    assert found, path
    scheme, root = found[1], found[2].rstrip("/")
    url = f"{scheme}://{root}"
    if scheme not in SYSTEMS or not root:
        known = ", ".join(f"{name}://" for name in SYSTEMS)
        raise CacheIncomplete(f"{url} is no folder in object storage: expected BUCKET/PATH behind {known}.")
    with storage_errors(url):
        system = SYSTEMS[scheme](root)
    return RemoteFolder(url, root, copies or _temporary_folder(), system)


def _s3(root: str) -> Any:
    named = os.environ.get
    endpoint = named("AWS_ENDPOINT_URL_S3") or named("AWS_ENDPOINT_URL")
    region = named("AWS_REGION") or named("AWS_DEFAULT_REGION")
    if not region:
        region = "us-east-1" if endpoint else fs.resolve_s3_region(root.partition("/")[0])
    options: dict[str, Any] = {"region": region, "endpoint_override": endpoint}
    if authorities := named("AWS_CA_BUNDLE"):
        options["tls_ca_file_path"] = authorities
    retries = fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS)
    options |= {"connect_timeout": CONNECTS_WITHIN, "request_timeout": SILENT_FOR, "retry_strategy": retries}
    try:
        return fs.S3FileSystem(**options)
    except TypeError as error:
        raise CacheError(
            f"AWS_CA_BUNDLE is set, and pyarrow {pa.__version__} can't be told of it ({error}). Upgrade pyarrow, or "
            "unset AWS_CA_BUNDLE if the storage's certificate is a public one."
        ) from error


def _gs(root: str) -> Any:
    return fs.GcsFileSystem(retry_time_limit=timedelta(seconds=CONNECTS_WITHIN))


# Not abfs: an error in pyarrow 26's file system for Azure can end the whole process.
SYSTEMS = {"s3": _s3, "gs": _gs}

S3_SETTINGS = "AWS_ENDPOINT_URL, AWS_DEFAULT_REGION, AWS_PROFILE, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"
SETTINGS = {"s3": S3_SETTINGS, "gs": "GOOGLE_APPLICATION_CREDENTIALS"}

# What pyarrow's message has in it -> what that means. Its types say no more than OSError.
REASONS = [
    (r"NO_SUCH_BUCKET", "there is no such bucket"),
    (r"NETWORK_CONNECTION|UNAVAILABLE|resolve host", "the storage can't be reached"),
    (r"ACCESS_DENIED|INVALID_(ACCESS|CLIENT)|SIGNATURE|EXPIRED|HTTP (401|403)", "the storage refuses access"),
    (r"HTTP 301|PermanentRedirect", "the bucket is in another region"),
]


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Turn what a storage's library raises into one CacheError; FileNotFoundError passes."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:  # pyarrow's errors of storages are these
        reason = next((reason for pattern, reason in REASONS if re.search(pattern, str(error))), "the storage refuses")
        words = textwrap.shorten(str(error), 300, placeholder=" ...")
        kind = CacheIncomplete if reason == REASONS[0][1] else CacheError
        raise kind(
            f"Cannot read {url}: {reason}. Check the address, {SETTINGS[url.partition(':')[0]]} and your rights there "
            f"(docs/sharing.md). The storage's words: {words}"
        ) from error


_held: dict[Path, int] = {}  # copies that this process reads; the system lets go of them when it ends


def _hold(folder: Path) -> None:
    """Make the folder if need be, and keep others from removing it; remove what was read longest ago.

    As far as what no process reads exceeds KEPT_BYTES.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / "lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder.mkdir(exist_ok=True)
        os.utime(folder)
        if folder not in _held:
            _held[folder] = os.open(folder, os.O_RDONLY)
            fcntl.flock(_held[folder], fcntl.LOCK_SH)
        kept = 0
        others = [other for other in folder.parent.iterdir() if other.is_dir() and other not in _held]
        for other in sorted(others, key=lambda other: other.stat().st_mtime, reverse=True):
            kept += sum(file.stat().st_size for file in other.iterdir())
            if kept > KEPT_BYTES:
                _remove_unless_held(other)


def _remove_unless_held(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
    except BlockingIOError:
        pass  # another process reads it
    finally:
        os.close(descriptor)


@cache
def _process_folder() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="refcache-")


def _temporary_folder() -> Path:
    # For the whole process: a lazy frame may outlive the reference that it was made from.
    return Path(_process_folder().name)
