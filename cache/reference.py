"""Reading a published reference cache: whole, of the expected reference, and covering every key asked for."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from cache.errors import CacheCorrupt, CacheError, CacheIncomplete, CacheMismatch, system_errors
from cache.identity import Identity, ReferenceIdentity, SomeIdentity, require_identity
from cache.key_set import KeyArray, Keys, KeySet, key_array, key_bytes
from cache.manifest import EXCHANGE, Manifest, Shard, file_digest, read_manifest, remedy
from cache.schema import KEY_COLUMN, LOGPS
from cache.shards import read_shard_metadata, require_known_version
from cache.spill import PartitionRows

SHOWN_KEYS = 3
GROUPS_AT_ONCE = 5  # row groups, where all are read
HASHING_THREADS = 8
ATTEMPTS = 20  # to find the folder between two publications


@dataclass(frozen=True)
class StoredRows:
    """Published rows of any kind. Make it with `open_rows`, which checks what is promised here."""

    path: Path
    manifest: Manifest
    identity: Identity
    intact: set[str] = field(default_factory=set, repr=False, compare=False)  # shards whose bytes were checked

    @property
    def n_rows(self) -> int:
        return self.manifest.n_rows

    @property
    def n_tokens(self) -> int:
        """Response tokens over all rows."""
        return self.manifest.n_tokens

    def scan(self) -> pl.LazyFrame:
        """All rows, lazily: all columns of their kind, sorted by response_key.

        The first call hashes every shard, since polars would read some flipped bytes as other log-probs. Raises
        CacheCorrupt naming the shard, CacheError where another publication has replaced it.
        """
        self._require_intact()
        if not self.manifest.shards:
            return pl.DataFrame(self.identity.kind.schema.empty_table()).lazy()
        return pl.scan_parquet([self.path / shard.file for shard in self.manifest.shards], glob=False)

    def keys(self) -> set[bytes]:
        """The response keys of all rows."""
        return set(self.key_set())

    def key_set(self) -> KeySet:
        """As `keys`, in 16 bytes of memory a row."""
        return KeySet(np.concatenate([key_array(()), *(key_array(rows[KEY_COLUMN]) for rows in self.key_tables())]))

    def key_tables(self) -> Iterator[pa.Table]:
        """The response keys of all rows, in order, some at a time."""
        return self.tables([])

    def tables(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """response_key and `columns` of all rows in the order of keys, up to 10,000 rows at a time."""
        for ranges in self._ranges:
            groups = np.arange(len(ranges.first))
            for start in range(0, len(groups), GROUPS_AT_ONCE):
                yield self._read(ranges, groups[start : start + GROUPS_AT_ONCE], columns)

    def matching(self, wanted: KeySet, columns: Sequence[str]) -> Iterator[tuple[npt.NDArray[np.int64], pa.Table]]:
        """Rows of `wanted` that there are: per shard, their positions in `wanted`, and response_key and `columns`.

        Reads only row groups that may hold one; memory holds the matches of one shard.
        """
        for ranges in self._ranges:
            hit = wanted.array.searchsorted(ranges.first) < wanted.array.searchsorted(ranges.last, side="right")
            if hit.any():
                rows = self._read(ranges, np.flatnonzero(hit), columns)
                positions = wanted.positions(key_array(rows[KEY_COLUMN]))
                found = positions >= 0
                if found.any():
                    yield positions[found], rows.filter(pa.array(found))

    def by_partition(self, keys: KeySet, bits: int, spill_to: Path) -> PartitionRows:
        """The rows of `keys` by partition, as cache.publish takes them; read from the shards partition by partition."""
        names = self.identity.kind.schema.names
        return lambda _, wanted: [rows for _, rows in self.matching(wanted, names)]

    def missing(self, keys: Keys) -> list[bytes]:
        """Those of `keys` that have no row, once each, in the order asked."""
        asked = key_array(keys)
        wanted = KeySet(asked)
        found = np.zeros(len(wanted), np.bool_)
        for positions, _ in self.matching(wanted, []):
            found[positions] = True
        return _absent(asked, wanted, found)

    def rows(self, keys: Keys, columns: Sequence[str] | None = None) -> pl.DataFrame:
        """One row for each of `keys`, in the order asked; a key asked twice comes twice. columns: None for all.

        Raises CacheIncomplete, naming how many are missing and the first few, rather than leave any out.
        """
        schema = self.identity.kind.schema
        columns = schema.names if columns is None else list(columns)
        asked = key_array(keys)
        wanted = KeySet(asked)
        row_of = np.full(len(wanted), -1)
        frames, n_found = [pl.DataFrame(schema.empty_table().select(columns))], 0
        for positions, rows in self.matching(wanted, columns):
            row_of[positions] = n_found + np.arange(len(positions))
            n_found += len(positions)
            frames.append(pl.DataFrame(rows.select(columns)))
        if n_found < len(wanted):
            absent = _absent(asked, wanted, row_of >= 0)
            raise CacheIncomplete(self.incomplete(len(absent), absent, len(asked)))
        return pl.concat(frames)[row_of[wanted.positions(asked)]]

    @cached_property
    def _ranges(self) -> list["_Ranges"]:
        """The first and last key of each row group, shard by shard, as the footers state them."""
        self._require_intact()
        found = []
        with self._reading():
            for shard in self.manifest.shards:
                metadata = pq.read_metadata(self.path / shard.file)
                columns = [metadata.row_group(i).column(0).statistics for i in range(metadata.num_row_groups)]
                first, last = (key_array([getattr(s, end) for s in columns]) for end in ("min", "max"))
                found.append(_Ranges(shard, first, last))
        return found

    def _read(self, ranges: "_Ranges", groups: npt.NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
        names = list(dict.fromkeys([KEY_COLUMN, *columns]))
        path = self.path / ranges.shard.file
        with self._reading(), pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False) as file:
            return file.read_row_groups(groups.tolist(), columns=names)

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
                        f"{shard.blake2b[:12]}. {remedy(self.path, self.identity.kind.stage)}"
                    )
                self.intact.add(shard.file)

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
                + remedy(self.path, self.identity.kind.stage)
            ) from error

    def _was_replaced(self, error: Exception) -> bool:
        # A publisher may have come back to these very rows meanwhile; then the shard that was gone is there again.
        is_back = isinstance(error, FileNotFoundError) and all(
            (self.path / name).exists() for name in self.manifest.files
        )
        return is_back or read_manifest(self.path) != self.manifest

    def incomplete(self, n_absent: int, absent: Iterable[bytes], asked: int) -> str:
        """The message of CacheIncomplete; `absent`: at least the first few of `n_absent` keys without a row."""
        first = ", ".join(key.hex() for key in islice(absent, SHOWN_KEYS)) + (", ..." if n_absent > SHOWN_KEYS else "")
        return (
            f"{self.path} lacks {n_absent} of the {asked} responses asked for (it has {self.n_rows}): {first}. The "
            f"pairs changed after it was written. Run `dvc repro {self.identity.kind.stage}`; only what is missing is "
            "computed."
        )


@dataclass(frozen=True)
class Reference(StoredRows):
    """The log-probs of a reference, published. Make it with `open_reference`."""

    identity: ReferenceIdentity

    def sum_logps(self, keys: Keys) -> npt.NDArray[np.float64]:
        """log pi_ref(response given prompt) in nats, (len(keys),) float64, in the order asked; raises as `rows`."""
        return self.rows(keys, ["sum_logp"])["sum_logp"].to_numpy()


class _Ranges(NamedTuple):
    shard: Shard
    first: KeyArray  # (row groups,)
    last: KeyArray


def _absent(asked: KeyArray, wanted: KeySet, found: npt.NDArray[np.bool_]) -> list[bytes]:
    absent = asked[~found[wanted.positions(asked)]]
    _, first = np.unique(absent, return_index=True)
    return key_bytes(absent[np.sort(first)])


def open_reference(path: Path | str, *, expect: ReferenceIdentity | None) -> Reference:
    """Open the reference cache in folder `path` for reading; `expect=None` accepts whichever reference it holds.

    Checks the manifest, the identity, and that the folder holds exactly the listed shards, each of the listed size and
    of the same reference; the bytes inside are checked when rows are first read. Raises CacheIncomplete (never
    published), CacheMismatch (another reference, kind, or a newer format) or CacheCorrupt (missing, damaged or foreign
    files).
    """
    folder = Path(path)
    manifest, identity = open_rows(folder, LOGPS.name, LOGPS.stage, ReferenceIdentity.from_dict, expect)
    return Reference(folder, manifest, identity)


def open_rows(
    folder: Path,
    kind: str,
    stage: str,
    parse: Callable[[dict[str, Any]], SomeIdentity],
    expect: SomeIdentity | None,
) -> tuple[Manifest, SomeIdentity]:
    """What `open_reference` does, for rows of any kind. parse: the manifest's identity to its class."""
    for remaining in reversed(range(ATTEMPTS)):
        try:
            with system_errors(f"read {folder}", kept="Nothing was changed."):
                return _open(folder, kind, stage, parse, expect)
        except CacheCorrupt:
            # A publication may have passed between two looks at the folder; real damage is still there next time.
            if not remaining:
                raise
    raise AssertionError("unreachable")


def _open(
    folder: Path,
    kind: str,
    stage: str,
    parse: Callable[[dict[str, Any]], SomeIdentity],
    expect: SomeIdentity | None,
) -> tuple[Manifest, SomeIdentity]:
    manifest = read_manifest(folder, stage)
    if manifest.kind != kind:
        raise CacheMismatch(f"{folder} is a reference cache of kind {manifest.kind!r}, expected {kind!r}.")
    identity = parse(manifest.identity)
    if expect is not None:
        require_identity(folder, identity, expect)
    for shard in manifest.shards:
        _require_shard(folder, shard, manifest, remedy(folder, stage))
    strays = stray_shards(folder, manifest)
    if strays:
        raise CacheCorrupt(
            f"{folder} holds {', '.join(strays)}, which {'is' if len(strays) == 1 else 'are'} not in its manifest; "
            "whoever scans the folder would read foreign rows. Move such files away, or run "
            f"`refcache verify {folder} --repair`, which does."
        )
    return manifest, identity


def stray_shards(folder: Path, manifest: Manifest) -> list[str]:
    """Parquet files in the folder that neither the manifest nor a publication under way accounts for."""
    present = {path.name for path in folder.glob("*.parquet")}
    try:
        exchanged = json.loads((folder / EXCHANGE).read_bytes())["shards"]
    except FileNotFoundError:
        exchanged = []
    return sorted(present - manifest.files - set(exchanged))


def _require_shard(folder: Path, shard: Shard, manifest: Manifest, remedy: str) -> None:
    path = folder / shard.file
    try:
        size = path.stat().st_size
        if size != shard.bytes:
            raise CacheCorrupt(f"{path} has {size} bytes, expected {shard.bytes}. {remedy}")
        found = read_shard_metadata(pq.read_schema(path))
    except FileNotFoundError:
        raise CacheCorrupt(f"{path} is listed in the manifest but missing. {remedy}") from None
    except (OSError, pa.ArrowException, ValueError) as error:  # ValueError: pyarrow decodes names in a damaged footer
        raise CacheCorrupt(f"{path} is no readable Parquet file: {error}. {remedy}") from error
    require_known_version(path, found)
    if found.get("reference_id") != manifest.reference_id:
        raise CacheMismatch(
            f"{path} belongs to reference {found.get('reference_id', 'unknown')}, "
            f"but the manifest beside it to {manifest.reference_id}. {remedy}"
        )
