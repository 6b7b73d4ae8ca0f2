"""Reading a published reference cache: whole, of the expected reference, and covering every key asked for."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from cache.errors import CacheCorrupt, CacheError, CacheIncomplete, CacheMismatch, system_errors
from cache.identity import ReferenceIdentity, require_identity
from cache.manifest import EXCHANGE, Manifest, Shard, file_digest, read_manifest, remedy
from cache.schema import KEY_COLUMN, LOGPS, LOGPS_SCHEMA
from cache.shards import read_shard_metadata, require_known_version

Keys = Sequence[bytes] | pl.Series
SHOWN_KEYS = 3
HASHING_THREADS = 8
ATTEMPTS = 20  # to find the folder between two publications


@dataclass(frozen=True)
class Reference:
    """A published reference cache. Make it with `open_reference`, which checks what is promised here."""

    path: Path
    manifest: Manifest
    identity: ReferenceIdentity
    intact: set[str] = field(default_factory=set, repr=False, compare=False)  # shards whose bytes were checked

    @property
    def n_rows(self) -> int:
        return self.manifest.n_rows

    @property
    def n_tokens(self) -> int:
        """Response tokens over all rows."""
        return self.manifest.n_tokens

    def scan(self) -> pl.LazyFrame:
        """All rows, lazily: the columns of LOGPS_SCHEMA, sorted by response_key.

        The first call hashes every shard, since polars would read some flipped bytes as other log-probs. Raises
        CacheCorrupt naming the shard, CacheError where another publication has replaced it.
        """
        self._require_intact()
        if not self.manifest.shards:
            return pl.DataFrame(LOGPS_SCHEMA.empty_table()).lazy()
        return pl.scan_parquet([self.path / shard.file for shard in self.manifest.shards], glob=False)

    def keys(self) -> set[bytes]:
        """The response keys of all rows."""
        return set(self._collect(self.scan().select(KEY_COLUMN))[KEY_COLUMN])

    def missing(self, keys: Keys) -> list[bytes]:
        """Those of `keys` that have no row, once each, in the order asked."""
        wanted = _series(keys).to_frame().lazy().unique(maintain_order=True)
        absent = wanted.join(self.scan().select(KEY_COLUMN), on=KEY_COLUMN, how="anti", maintain_order="left")
        return self._collect(absent)[KEY_COLUMN].to_list()

    def rows(self, keys: Keys, columns: Sequence[str] = tuple(LOGPS_SCHEMA.names)) -> pl.DataFrame:
        """One row for each of `keys`, in the order asked; a key asked twice comes twice.

        Raises CacheIncomplete, naming how many are missing and the first few, rather than leave any out.
        """
        absent = self.missing(keys)
        if absent:
            raise CacheIncomplete(self._incomplete(absent, len(keys)))
        wanted = _series(keys)
        found = self.scan().select(list(dict.fromkeys([KEY_COLUMN, *columns])))
        found = found.filter(pl.col(KEY_COLUMN).is_in(wanted.unique().implode()))
        joined = wanted.to_frame().lazy().join(found, on=KEY_COLUMN, how="left", maintain_order="left")
        return self._collect(joined.select(columns))

    def sum_logps(self, keys: Keys) -> npt.NDArray[np.float64]:
        """log pi_ref(response given prompt) in nats, (len(keys),) float64, in the order asked; raises as `rows`."""
        return self.rows(keys, ["sum_logp"])["sum_logp"].to_numpy()

    def _require_intact(self) -> None:
        """Hash the shards that were not hashed yet, and raise CacheCorrupt naming the first that is damaged.

        Page checksums do not cover the headers of pages and the footer, nor does polars look at them.
        """
        unread = [shard for shard in self.manifest.shards if shard.file not in self.intact]
        with self._reading(), ThreadPoolExecutor(HASHING_THREADS) as pool:  # hashlib releases the interpreter lock
            digests = pool.map(lambda shard: file_digest(self.path / shard.file), unread)
            for shard, digest in zip(unread, digests, strict=True):
                if digest != shard.blake2b:
                    raise CacheCorrupt(
                        f"{self.path / shard.file} is damaged: its bytes hash to {digest[:12]}, expected "
                        f"{shard.blake2b[:12]}. {remedy(self.path)}"
                    )
                self.intact.add(shard.file)

    def _collect(self, frame: pl.LazyFrame) -> pl.DataFrame:
        with self._reading():
            return frame.collect()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Tell a shard that a new publication removed from one that is damaged."""
        try:
            yield
        except (OSError, pa.ArrowException, pl.exceptions.PolarsError) as error:
            if self._was_replaced(error):
                raise CacheError(
                    f"{self.path} was published anew while it was being read, and its old shards are gone. Run again."
                ) from error
            raise CacheCorrupt(
                f"A shard of {self.path} cannot be read: {error}. `refcache verify {self.path}` names it. "
                + remedy(self.path)
            ) from error

    def _was_replaced(self, error: Exception) -> bool:
        # A publisher may have come back to these very rows meanwhile; then the shard that was gone is there again.
        is_back = isinstance(error, FileNotFoundError) and all(
            (self.path / name).exists() for name in self.manifest.files
        )
        return is_back or read_manifest(self.path) != self.manifest

    def _incomplete(self, absent: list[bytes], asked: int) -> str:
        first = ", ".join(key.hex() for key in absent[:SHOWN_KEYS]) + (", ..." if len(absent) > SHOWN_KEYS else "")
        return (
            f"{self.path} lacks {len(absent)} of the {asked} responses asked for (it has {self.n_rows}): {first}. "
            "The pairs changed after it was scored. Run `dvc repro score`; only what is missing is scored."
        )


def _series(keys: Keys) -> pl.Series:
    return pl.Series(KEY_COLUMN, keys, dtype=pl.Binary)


def open_reference(path: Path | str, *, expect: ReferenceIdentity | None) -> Reference:
    """Open the reference cache in folder `path` for reading; `expect=None` accepts whichever reference it holds.

    Checks the manifest, the identity, and that the folder holds exactly the listed shards, each of the listed size and
    of the same reference; the bytes inside are checked when rows are first read. Raises CacheIncomplete (never
    published), CacheMismatch (another reference, kind, or a newer format) or CacheCorrupt (missing, damaged or foreign
    files).
    """
    folder = Path(path)
    for remaining in reversed(range(ATTEMPTS)):
        try:
            with system_errors(f"read {folder}", kept="Nothing was changed."):
                return _open(folder, expect)
        except CacheCorrupt:
            # A publication may have passed between two looks at the folder; real damage is still there next time.
            if not remaining:
                raise
    raise AssertionError("unreachable")


def _open(folder: Path, expect: ReferenceIdentity | None) -> Reference:
    manifest = read_manifest(folder)
    if manifest.kind != LOGPS.name:
        raise CacheMismatch(f"{folder} is a reference cache of kind {manifest.kind!r}, expected {LOGPS.name!r}.")
    identity = ReferenceIdentity.from_dict(manifest.identity)
    if expect is not None:
        require_identity(folder, identity, expect)
    for shard in manifest.shards:
        _require_shard(folder, shard, manifest)
    strays = stray_shards(folder, manifest)
    if strays:
        raise CacheCorrupt(
            f"{folder} holds {', '.join(strays)}, which {'is' if len(strays) == 1 else 'are'} not in its manifest; "
            "whoever scans the folder would read foreign rows. Move such files away, or run "
            f"`refcache verify {folder} --repair`, which does."
        )
    return Reference(folder, manifest, identity)


def stray_shards(folder: Path, manifest: Manifest) -> list[str]:
    """Parquet files in the folder that neither the manifest nor a publication under way accounts for."""
    present = {path.name for path in folder.glob("*.parquet")}
    try:
        exchanged = json.loads((folder / EXCHANGE).read_bytes())["shards"]
    except FileNotFoundError:
        exchanged = []
    return sorted(present - manifest.files - set(exchanged))


def _require_shard(folder: Path, shard: Shard, manifest: Manifest) -> None:
    path = folder / shard.file
    try:
        size = path.stat().st_size
        if size != shard.bytes:
            raise CacheCorrupt(f"{path} has {size} bytes, expected {shard.bytes}. {remedy(folder)}")
        found = read_shard_metadata(pq.read_schema(path))
    except FileNotFoundError:
        raise CacheCorrupt(f"{path} is listed in the manifest but missing. {remedy(folder)}") from None
    except (OSError, pa.ArrowException, ValueError) as error:  # ValueError: pyarrow decodes names in a damaged footer
        raise CacheCorrupt(f"{path} is no readable Parquet file: {error}. {remedy(folder)}") from error
    require_known_version(path, found)
    if found.get("reference_id") != manifest.reference_id:
        raise CacheMismatch(
            f"{path} belongs to reference {found.get('reference_id', 'unknown')}, "
            f"but the manifest beside it to {manifest.reference_id}. {remedy(folder)}"
        )
