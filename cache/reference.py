"""Reading a published reference cache: whole, of the expected reference, and covering every key asked for."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from cache.errors import CacheCorrupt, CacheError, CacheIncomplete
from cache.identity import Identity, ReferenceIdentity
from cache.key_set import KeyArray, Keys, KeySet, key_array, key_bytes
from cache.manifest import Manifest, Shard, file_digest, read_manifest, remedy
from cache.opening import open_rows
from cache.remote import RemoteFolder
from cache.schema import KEY_COLUMN, LOGPS
from cache.shards import partition_bits
from cache.spill import PartitionRows

SHOWN_KEYS = 3
GROUPS_AT_ONCE = 5  # row groups, where all are read
HASHING_THREADS = 8


@dataclass(frozen=True)
class StoredRows:
    """Published rows of any kind. Make it with `open_rows`, which checks what is promised here."""

    path: Path
    manifest: Manifest
    identity: Identity
    remote: RemoteFolder | None = None  # then `path` holds copies of the shards that were asked for
    intact: set[str] = field(default_factory=set, repr=False, compare=False)  # shards whose bytes were checked
    _footers: dict[str, "_Ranges"] = field(default_factory=dict, repr=False, compare=False)

    @property
    def place(self) -> Path | RemoteFolder:
        """Where it was published, for messages."""
        return self.remote or self.path

    @property
    def n_rows(self) -> int:
        return self.manifest.n_rows

    @property
    def n_tokens(self) -> int:
        """Response tokens over all rows."""
        return self.manifest.n_tokens

    def scan(self) -> pl.LazyFrame:
        """All rows, lazily: all columns of their kind, sorted by response_key.

        The first call hashes every shard, since polars would read some flipped bytes as other log-probs; of object
        storage it fetches them. Raises CacheCorrupt naming the shard, CacheError where another publication has
        replaced it.
        """
        self._require_intact(self.manifest.shards)
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
        for ranges in self._ranges():
            groups = np.arange(len(ranges.first))
            for start in range(0, len(groups), GROUPS_AT_ONCE):
                yield self._read(ranges, groups[start : start + GROUPS_AT_ONCE], columns)

    def matching(self, wanted: KeySet, columns: Sequence[str]) -> Iterator[tuple[npt.NDArray[np.int64], pa.Table]]:
        """Rows of `wanted` that there are: per shard, their positions in `wanted`, and response_key and `columns`.

        Reads only row groups that may hold one; memory holds the matches of one shard.
        """
        for ranges in self._ranges(wanted):
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
        return _absent(asked, ~found[wanted.positions(asked)])

    def rows(self, keys: Keys, columns: Sequence[str] | None = None) -> pl.DataFrame:
        """One row for each of `keys`, in the order asked; a key asked twice comes twice. columns: None for all.

        Raises CacheIncomplete, naming how many are missing and the first few, rather than leave any out.
        """
        columns = self.identity.kind.schema.names if columns is None else list(columns)
        asked = key_array(keys)
        found, places = self.find(asked, columns)
        if (places < 0).any():
            absent = _absent(asked, places < 0)
            raise CacheIncomplete(self.incomplete(len(absent), absent, len(asked)))
        return found[places]

    def find(self, keys: Keys, columns: Sequence[str]) -> tuple[pl.DataFrame, npt.NDArray[np.int64]]:
        """`columns` of the rows that there are for `keys`, and which of these each key has, (len(keys),); -1: none."""
        asked = key_array(keys)
        wanted = KeySet(asked)
        row_of = np.full(len(wanted), -1)
        frames, n_found = [pl.DataFrame(self.identity.kind.schema.empty_table().select(list(columns)))], 0
        for positions, rows in self.matching(wanted, columns):
            row_of[positions] = n_found + np.arange(len(positions))
            n_found += len(positions)
            frames.append(pl.DataFrame(rows.select(list(columns))))
        return pl.concat(frames), row_of[wanted.positions(asked)]

    def _ranges(self, wanted: KeySet | None = None) -> list["_Ranges"]:
        """The first and last key of each row group, shard by shard, as the footers state them.

        wanted: only these keys matter (None: all). Of object storage, shards that can't hold one are left there.
        """
        shards: Sequence[Shard] = self.manifest.shards
        if self.remote is not None and wanted is not None:
            shards = self.remote.holding(wanted, self.manifest, self._bits)
        unread = [shard for shard in shards if shard.file not in self._footers]
        self._require_intact(unread)
        with self._reading():
            for shard in unread:
                self._footers[shard.file] = self._footer(shard)
        return [self._footers[shard.file] for shard in shards]

    def _footer(self, shard: Shard) -> "_Ranges":
        metadata = pq.read_metadata(self.path / shard.file)
        columns = [metadata.row_group(i).column(0).statistics for i in range(metadata.num_row_groups)]
        first, last = (key_array([getattr(s, end) for s in columns]) for end in ("min", "max"))
        if self.remote is not None:
            self.remote.require_own(shard, metadata.schema.to_arrow_schema(), [first, last], self.manifest, self._bits)
        return _Ranges(shard, first, last)

    @property
    def _bits(self) -> int:
        return partition_bits(self.n_rows, self.identity.kind.shard_rows)

    def _read(self, ranges: "_Ranges", groups: npt.NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
        names = list(dict.fromkeys([KEY_COLUMN, *columns]))
        path = self.path / ranges.shard.file
        with self._reading(), pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False) as file:
            return file.read_row_groups(groups.tolist(), columns=names)

    def _require_intact(self, shards: Iterable[Shard]) -> None:
        """Hash those that were not hashed yet, and raise CacheCorrupt naming the first that is damaged.

        Page checksums do not cover the headers of pages and the footer, nor does polars look at them.
        """
        unread = [shard for shard in shards if shard.file not in self.intact]
        if unread:
            with self._reading(), ThreadPoolExecutor(HASHING_THREADS) as pool:  # hashlib releases the interpreter lock
                for shard in pool.map(self._intact, unread):
                    self.intact.add(shard.file)

    def _intact(self, shard: Shard) -> Shard:
        path = self.path
        digest = file_digest(path / shard.file) if self.remote is None else self.remote.fetch(shard, path)
        if digest != shard.blake2b:
            raise CacheCorrupt(
                f"{self.place}/{shard.file} is damaged: its bytes hash to {digest[:12]}, expected "
                f"{shard.blake2b[:12]}. {remedy(self.place, self.identity.kind.stage)}"
            )
        return shard

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Tell a shard that a new publication removed from one that is damaged."""
        try:
            yield
        except (OSError, pa.ArrowException, pl.exceptions.PolarsError) as error:
            if self._was_replaced(error):
                raise CacheError(
                    f"{self.place} was published anew while it was being read, and its old shards are gone. Run again."
                ) from error
            names = "" if self.remote else f" `refcache verify {self.path}` names it."
            raise CacheCorrupt(
                f"A shard of {self.place} cannot be read: {error}.{names} "
                + remedy(self.place, self.identity.kind.stage)
            ) from error

    def _was_replaced(self, error: Exception) -> bool:
        if self.remote is not None:
            return self.remote.manifest(self.identity.kind.stage) != self.manifest
        # A publisher may have come back to these very rows meanwhile; then the shard that was gone is there again.
        is_back = isinstance(error, FileNotFoundError) and all(
            (self.path / name).exists() for name in self.manifest.files
        )
        return is_back or read_manifest(self.path) != self.manifest

    def incomplete(self, n_absent: int, absent: Iterable[bytes], asked: int) -> str:
        """The message of CacheIncomplete; `absent`: at least the first few of `n_absent` keys without a row."""
        first = ", ".join(key.hex() for key in islice(absent, SHOWN_KEYS)) + (", ..." if n_absent > SHOWN_KEYS else "")
        return (
            f"{self.place} lacks {n_absent} of the {asked} responses asked for (it has {self.n_rows}): {first}. The "
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


def _absent(asked: KeyArray, is_absent: npt.NDArray[np.bool_]) -> list[bytes]:
    """Once each, in the order asked."""
    absent = asked[is_absent]
    _, first = np.unique(absent, return_index=True)
    return key_bytes(absent[np.sort(first)])


def open_reference(path: Path | str, *, expect: ReferenceIdentity | None, copies: Path | None = None) -> Reference:
    """Open the reference cache in folder `path` for reading; `expect=None` accepts whichever reference it holds.

    Checks the manifest, the identity, and that the folder holds exactly the listed shards, each of the listed size and
    of the same reference; the bytes inside are checked when rows are first read. Raises CacheIncomplete (never
    published), CacheMismatch (another reference, kind, or a newer format) or CacheCorrupt (missing, damaged or foreign
    files).

    `path` may be an address in object storage, s3://BUCKET/PATH. Then the manifest and a listing are read, and rows
    fetch the shards that can hold them, whole, to `copies` (None: a temporary folder). Raises CacheError as well where
    the storage can't be reached or refuses.
    """
    return Reference(*open_rows(path, LOGPS.name, LOGPS.stage, ReferenceIdentity.from_dict, expect, copies))
