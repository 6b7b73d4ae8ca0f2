"""From the journals and what is published already to a new publication of exactly the rows that the pairs need.

Rows that transformers scored again in float32 take precedence over the engine's, on every machine: their journal lies
outside DVC's outputs and does not travel with a clone; drift.json does, and names them.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from cache import (
    Journal,
    Keys,
    KeySet,
    RowSource,
    StoredRows,
    publish_rows,
)
from cache.identity import Identity
from cache.repair import listed_shards, sound_part
from pipeline.reference.drift import read_drift
from pipeline.workspace import scratch_folder


def sound_reference(out: Path, identity: Identity) -> StoredRows | None:
    """What is published at `out`, as far as it is sound and of this very reference; None where nothing is.

    Rows of a damaged shard would be published anew under a fresh checksum, and nobody could tell them any more.
    """
    sound = sound_part(out, identity)
    listed = listed_shards(out, identity)
    lost = sorted(listed - sound.manifest.files if sound else listed)
    if lost:
        again = "scored" if identity.kind.stage == "score" else "sketched"
        print(
            f"{len(lost)} of the {len(listed)} shards of {out} are damaged or missing ({', '.join(lost[:3])}"
            f"{', ...' if len(lost) > 3 else ''}). Those of their rows that the journal lacks are {again} again.",
            file=sys.stderr,
        )
    return sound


def publish_needed(out: Path, keys: Keys, sources: Sequence[RowSource], identity: Identity) -> None:
    """Publish the rows of exactly `keys`, each from the first of `sources` that has it (see cache.publish_rows)."""
    wanted = keys if isinstance(keys, KeySet) else KeySet(keys)
    publish_rows(out, wanted, sources, identity, scratch=scratch_folder())


_ROWS_PER_FRAME = 2000


def recorded_rows(out: Path, reference_id: str) -> KeySet:
    """Keys of the rows published at `out` that drift.json says were rescored; none if it is of another reference."""
    content = read_drift(out) or {}
    if content.get("reference_id") != reference_id:
        return KeySet()
    return KeySet(bytes.fromhex(key) for key in content.get("rescored_keys", []))


def adopt(keys: KeySet, journal: Journal, published: StoredRows) -> None:
    """Copy those of `keys` that `published` has and the journal of rescored rows lacks from the one to the other.

    In a clone that scored this reference itself, the engine's journalled rows would otherwise come back.
    """
    wanted = keys - journal.key_set()
    wanted -= KeySet(published.missing(wanted.array))
    for start in range(0, len(wanted), _ROWS_PER_FRAME):
        journal.append(published.rows(wanted.array[start : start + _ROWS_PER_FRAME]).to_arrow())
