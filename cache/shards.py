"""From rows to Parquet files: which row goes into which shard, and what its bytes are. Pure functions of the rows."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from cache.durable import partial_of, sync_file
from cache.errors import CacheMismatch
from cache.identity import identity_digest
from cache.key_set import KeyArray, key_array, key_bytes
from cache.manifest import Manifest, Shard, file_digest
from cache.schema import FORMAT_VERSION, KEY_COLUMN, METADATA_KEY, ROW_GROUP_ROWS, Kind, conform, parquet_options

SHARD_ROWS = 50_000  # at most, on average: some 100 MB of 500-token responses


def partition_bits(n_rows: int, shard_rows: int | None = None) -> int:
    """Log2 of the number of shards: the smallest with at most `shard_rows` rows a shard (None: SHARD_ROWS)."""
    bits = 0
    while n_rows > (shard_rows or SHARD_ROWS) << bits:
        bits += 1
    return bits


def partitions(rows: pa.Table, shard_rows: int | None = None) -> Iterator[tuple[int, pa.Table]]:
    """(partition, its rows) in order: partition p holds the keys whose leading bits are p; empty ones are left out."""
    bits = partition_bits(rows.num_rows, shard_rows)
    numbers = partitions_of(key_array(rows[KEY_COLUMN]), bits)
    for number in range(1 << bits):
        # Filter before sorting: a take over the whole table would copy it, and overflow the offsets of its lists.
        part = rows.filter(pa.array(numbers == number))
        if part.num_rows:
            yield number, part


def partitions_of(keys: KeyArray, bits: int) -> npt.NDArray[np.uint32]:
    """The leading `bits` bits of each key, (n,)."""
    # A shift by all 32 bits is undefined, hence the special case.
    leading = np.ascontiguousarray(keys).view(">u4")[::4].astype(np.uint32)
    return leading >> np.uint32(32 - bits) if bits else np.zeros(len(keys), np.uint32)


def write_shard(folder: Path, number: int, rows: pa.Table, kind: Kind, identity: dict[str, Any]) -> tuple[Path, Shard]:
    """Write one partition's rows, sorted by key, under a provisional name; returns that path and its manifest entry.

    The same rows and identity give the same bytes, for one version of pyarrow. Raises CacheError for rows that must
    not be stored and ValueError for a repeated key.
    """
    # One chunk, or the bytes of the file would depend on how the rows happened to be chunked.
    rows = conform(rows, kind).combine_chunks().replace_schema_metadata(shard_metadata(kind, identity))
    order = _key_order(rows)
    in_order = bool((order[1:] > order[:-1]).all())  # then a copy of all rows is saved
    partial = partial_of(folder / f"{kind.name}-{number:05d}")
    options = parquet_options(kind) | {"sorting_columns": [pq.SortingColumn(0)]}
    step = kind.row_group_rows or ROW_GROUP_ROWS
    with pq.ParquetWriter(partial, rows.schema, **options) as writer:
        for start in range(0, max(len(order), 1), step):
            group = rows.slice(start, step) if in_order else rows.take(order[start : start + step])
            kind.check(group)
            writer.write_table(group)
    sync_file(partial)
    digest = file_digest(partial)
    tokens = int(rows["n_tokens"].to_numpy().sum(dtype=np.int64)) if "n_tokens" in rows.column_names else 0
    shard = Shard(
        file=f"{kind.name}-{number:05d}-{digest[:32]}.parquet",
        rows=rows.num_rows,
        tokens=tokens,
        bytes=partial.stat().st_size,
        blake2b=digest,
    )
    return partial, shard


def shard_metadata(kind: Kind, identity: dict[str, Any]) -> dict[bytes, bytes]:
    """What every shard says about itself, so that it can be judged without the manifest."""
    content = {
        "format_version": FORMAT_VERSION,
        "kind": kind.name,
        "identity": identity,
        "reference_id": identity_digest(identity),
    }
    return {METADATA_KEY: json.dumps(content, sort_keys=True, ensure_ascii=True).encode()}


def read_shard_metadata(schema: pa.Schema) -> dict[str, Any]:
    """The inverse of `shard_metadata`; empty when the file carries none that can be read."""
    try:
        content = json.loads((schema.metadata or {})[METADATA_KEY])
    except (KeyError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def require_known_version(path: object, stated: dict[str, Any]) -> None:
    """Raise CacheMismatch where a shard's own metadata says that a newer version wrote it."""
    version = stated.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CacheMismatch(
            f"{path} has format version {version}; this refcache reads up to {FORMAT_VERSION}. Upgrade refcache; "
            "nothing was changed."
        )


def require_same_reference(path: object, schema: pa.Schema, manifest: Manifest, remedy: str) -> None:
    """Raise CacheMismatch where a shard's own metadata says that it is another reference's, or a newer version's."""
    stated = read_shard_metadata(schema)
    require_known_version(path, stated)
    if stated.get("reference_id") != manifest.reference_id:
        raise CacheMismatch(
            f"{path} belongs to reference {stated.get('reference_id', 'unknown')}, "
            f"but the manifest beside it to {manifest.reference_id}. {remedy}"
        )


def _key_order(rows: pa.Table) -> npt.NDArray[np.int64]:
    """The indices that sort `rows` by key; ValueError for a repeated one."""
    keys = key_array(rows[KEY_COLUMN])
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    repeated = np.flatnonzero(keys[1:] == keys[:-1])
    if len(repeated):
        key = key_bytes(keys[repeated[:1]])[0].hex()
        raise ValueError(f"response {key} was given twice ({len(repeated)} such rows); each response is stored once")
    return order
