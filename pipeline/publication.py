"""From the journals and what is published already to a new publication of exactly the rows that the pairs need."""

import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import pyarrow as pa

from cache import (
    LOGPS_SCHEMA,
    Journal,
    Reference,
    ReferenceIdentity,
    publish_reference,
)
from cache.repair import listed_shards, sound_part


def sound_reference(out: Path, identity: ReferenceIdentity) -> Reference | None:
    """What is published at `out`, as far as it is sound and of this very reference; None where nothing is.

    Rows of a damaged shard would be published anew under a fresh checksum, and nobody could tell them any more.
    """
    sound = sound_part(out, identity)
    listed = listed_shards(out, identity)
    lost = sorted(listed - sound.manifest.files if sound else listed)
    if lost:
        print(
            f"{len(lost)} of the {len(listed)} shards of {out} are damaged or missing ({', '.join(lost[:3])}"
            f"{', ...' if len(lost) > 3 else ''}). Those of their rows that the journal lacks are scored again.",
            file=sys.stderr,
        )
    return sound


def publish_needed(
    out: Path,
    keys: set[bytes],
    *,
    journals: Sequence[Journal],
    published: Reference | None,
    identity: ReferenceIdentity,
) -> None:
    """Publish the rows of exactly `keys`: from the first journal that has them, else from `published`."""
    tables, wanted = [], set(keys)
    for table in chain.from_iterable(journal.tables() for journal in journals):
        found = table["response_key"].to_pylist()
        tables.append(table.filter(pa.array([key in wanted for key in found], pa.bool_())))
        wanted.difference_update(found)
    if wanted:
        assert published is not None  # whatever neither held was scored and journalled
        tables.append(published.rows(sorted(wanted)).to_arrow().cast(LOGPS_SCHEMA))
    publish_reference(out, pa.concat_tables(tables), identity)
