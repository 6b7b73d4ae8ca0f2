"""From the journals and what is published already to a new publication of exactly the rows that the pairs need."""

import sys
from collections.abc import Sequence
from pathlib import Path

from cache import (
    Keys,
    KeySet,
    RowSource,
    StoredRows,
    publish_rows,
)
from cache.identity import Identity
from cache.repair import listed_shards, sound_part
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
