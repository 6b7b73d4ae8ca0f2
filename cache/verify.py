"""Reading every byte of a published reference cache and holding it against what it says about itself."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cache.errors import CacheCorrupt, CacheError, system_errors
from cache.manifest import EXCHANGE, MANIFEST, Manifest, Shard, file_digest, read_manifest, remedy
from cache.schema import KEY_COLUMN, LOGPS
from cache.shards import key_words, partition_bits, partition_numbers, read_shard_metadata

COMPANIONS = {MANIFEST, "drift.json"}  # what may stand beside the shards


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong: in which file, what, and what to do about it."""

    file: str
    problem: str
    remedy: str


def verify(path: Path | str, *, on_sound: Callable[[Shard], None] | None = None) -> list[Finding]:
    """Everything that is wrong with the reference cache in folder `path`; an empty list means it is sound.

    Checks each shard's digest, schema, identity, row and token counts, order of keys, values and sums, and the folder
    for missing and unknown files. `on_sound` is called with each sound shard as it is done. Raises CacheIncomplete when
    the folder was never published and CacheMismatch when a newer version wrote it.
    """
    folder = Path(path)
    with system_errors(f"read {folder}", kept="Nothing was changed."):
        return _verify(folder, on_sound)


def _verify(folder: Path, on_sound: Callable[[Shard], None] | None) -> list[Finding]:
    try:
        manifest = read_manifest(folder)
    except CacheCorrupt as error:
        return [Finding(file=MANIFEST, problem=str(error), remedy=remedy(folder))]
    findings = list(_check_folder(folder, manifest))
    for shard in manifest.shards:
        # After the first problem in a shard, the others follow from it.
        problem = next(_check_shard(folder, shard, manifest), None)
        if problem is not None:
            findings.append(Finding(file=shard.file, problem=problem, remedy=remedy(folder)))
        elif on_sound is not None:
            on_sound(shard)
    return findings


def _check_folder(folder: Path, manifest: Manifest) -> Iterator[Finding]:
    for name in sorted(path.name for path in folder.iterdir()):
        if name in manifest.files | COMPANIONS or name.startswith("."):
            continue
        if name == EXCHANGE or name.endswith(".partial"):
            yield Finding(
                file=name,
                problem="left behind by an interrupted publication (or one is under way)",
                remedy="Run `dvc repro -f score`, which completes it.",
            )
        else:
            yield Finding(
                file=name,
                problem="not in the manifest",
                remedy="Move it away; `dvc repro -f score` removes shards of earlier publications itself.",
            )
    if manifest.kind != LOGPS.name:
        yield Finding(file=MANIFEST, problem=f"unknown kind {manifest.kind!r}", remedy="Upgrade refcache.")


def _check_shard(folder: Path, shard: Shard, manifest: Manifest) -> Iterator[str]:
    path = folder / shard.file
    if not path.is_file():
        yield "listed in the manifest but missing"
        return
    size = path.stat().st_size
    if size != shard.bytes:
        yield f"has {size} bytes, expected {shard.bytes}"
    elif (digest := file_digest(path)) != shard.blake2b:
        yield f"its bytes hash to {digest[:12]}, expected {shard.blake2b[:12]}"
    try:
        yield from _check_content(path, shard, manifest)
    except (OSError, pa.ArrowException, ValueError) as error:
        yield f"cannot be read: {error}"


def _check_content(path: Path, shard: Shard, manifest: Manifest) -> Iterator[str]:
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        schema = file.schema_arrow
        identity = read_shard_metadata(schema).get("reference_id")
        if identity != manifest.reference_id:
            yield f"belongs to reference {identity}, expected {manifest.reference_id}"
        if not schema.remove_metadata().equals(LOGPS.schema):
            yield f"has the columns {schema.names}, or their types, not those of kind {LOGPS.name}"
            return
        keys, tokens = [np.empty((0, 2), dtype=np.uint64)], 0
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group)
            try:
                LOGPS.check(rows)
            except CacheError as error:
                yield str(error)
            keys.append(key_words(rows[KEY_COLUMN]))
            tokens += int(rows["n_tokens"].to_numpy().sum(dtype=np.int64))
    words = np.concatenate(keys)
    if (len(words), tokens) != (shard.rows, shard.tokens):
        yield f"has {len(words)} rows and {tokens} tokens, expected {shard.rows} and {shard.tokens}"
    high, low = words[:, 0], words[:, 1]
    if not ((high[1:] > high[:-1]) | ((high[1:] == high[:-1]) & (low[1:] > low[:-1]))).all():
        yield "its rows are not sorted by response_key, or repeat one"
    if len(set(partition_numbers(words, partition_bits(manifest.n_rows)).tolist())) > 1:
        yield "holds keys of more than one partition"
