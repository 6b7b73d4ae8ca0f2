"""Reading every byte of a published reference cache and holding it against what it says about itself."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cache.errors import CacheCorrupt, CacheError, CacheMismatch, system_errors
from cache.key_set import KeyArray, key_array
from cache.manifest import EXCHANGE, MANIFEST, Manifest, Shard, file_digest, read_manifest, remedy
from cache.schema import KEY_COLUMN, LOGPS, Kind
from cache.shards import partition_bits, partitions_of, read_shard_metadata, require_known_version
from cache.sketches import stated_identity, stored_kind, writing_stage

DRIFT = "drift.json"
COMPANIONS = {MANIFEST, DRIFT}  # what may stand beside the shards


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
    stage = writing_stage(stored_kind(folder))
    try:
        manifest = read_manifest(folder, stage)
    except CacheCorrupt as error:
        return [Finding(file=MANIFEST, problem=str(error), remedy=remedy(folder, stage))]
    findings = list(_check_folder(folder, manifest))
    try:
        kind = stated_identity(manifest).kind
    except CacheError as error:
        return [*findings, Finding(file=MANIFEST, problem=str(error), remedy="Upgrade refcache.")]
    for shard in manifest.shards:
        problem = _problem(folder, shard, manifest, kind)
        if problem is not None:
            findings.append(Finding(file=shard.file, problem=problem, remedy=remedy(folder, kind.stage)))
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
                remedy=f"Run `dvc repro -f {writing_stage(manifest.kind)}`, which completes it.",
            )
        else:
            yield Finding(
                file=name,
                problem="not in the manifest",
                remedy=f"Move it away, or run `refcache verify {folder} --repair`, which does.",
            )
    if not is_json_object_or_absent(folder / DRIFT):
        yield Finding(
            file=DRIFT,
            problem="is not a JSON object",
            remedy=f"Run `refcache verify {folder} --repair`; the drift is measured again.",
        )


def is_json_object_or_absent(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except FileNotFoundError:
        return True
    except ValueError:
        return False


def _problem(folder: Path, shard: Shard, manifest: Manifest, kind: Kind) -> str | None:
    path = folder / shard.file
    if not path.is_file():
        return "listed in the manifest but missing"
    size = path.stat().st_size
    if size != shard.bytes:
        return f"has {size} bytes, expected {shard.bytes}"
    if (digest := file_digest(path)) != shard.blake2b:
        return f"its bytes hash to {digest[:12]}, expected {shard.blake2b[:12]}"
    try:
        content = read_content(path, manifest.reference_id, kind)
    except UnsoundShard as unsound:
        return str(unsound)
    if (content.rows, content.tokens) != (shard.rows, shard.tokens):
        found, expected = f"{content.rows} rows and {content.tokens} tokens", f"{shard.rows} and {shard.tokens}"
        return f"has {found}, expected {expected}"
    bits = partition_bits(manifest.n_rows, kind.shard_rows)
    if len(set(partitions_of(content.ends, bits).tolist())) > 1:
        return "holds keys of more than one partition"
    return None


class UnsoundShard(Exception):
    """What is wrong inside a shard; the first thing found, since the others follow from it."""


class ShardContent(NamedTuple):
    """ends: its first and its last key, or none for no rows."""

    rows: int
    tokens: int
    ends: KeyArray


def read_content(path: Path, reference_id: str, kind: Kind = LOGPS) -> ShardContent:
    """Read all of a shard; raises UnsoundShard for another reference, other columns, refused values or wrong order.

    Raises CacheMismatch for a shard that a newer version wrote.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            schema = file.schema_arrow
            stated = read_shard_metadata(schema)
            require_known_version(path, stated)
            if stated.get("reference_id") != reference_id:
                raise UnsoundShard(f"belongs to reference {stated.get('reference_id')}, expected {reference_id}")
            if not schema.remove_metadata().equals(kind.schema):
                raise UnsoundShard(f"has the columns {schema.names}, or their types, not those of kind {kind.name}")
            parts, tokens = [key_array(())], 0
            for group in range(file.num_row_groups):
                rows = file.read_row_group(group)
                kind.check(rows)
                parts.append(key_array(rows[KEY_COLUMN]))
                if "n_tokens" in schema.names:
                    tokens += int(rows["n_tokens"].to_numpy().sum(dtype=np.int64))
    except CacheMismatch:  # a newer version's: not damage
        raise
    except CacheError as error:  # of the check of values
        raise UnsoundShard(str(error)) from error
    except (OSError, pa.ArrowException, ValueError) as error:
        raise UnsoundShard(f"cannot be read: {error}") from error
    keys = np.concatenate(parts)
    if not (keys[1:] > keys[:-1]).all():
        raise UnsoundShard("its rows are not sorted by response_key, or repeat one")
    return ShardContent(len(keys), tokens, keys[[0, -1]] if len(keys) else keys)
