"""From the journals and what is published already to a new publication of exactly the rows that the pairs need."""

import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import pyarrow as pa

from cache import (
    LOGPS_SCHEMA,
    CacheCorrupt,
    CacheError,
    Journal,
    Reference,
    ReferenceIdentity,
    open_reference,
    publish_reference,
    verify,
)


def sound_reference(out: Path, identity: ReferenceIdentity) -> Reference | None:
    """What is published at `out`, if it is of this very reference and whole."""
    try:
        found = open_reference(out, expect=identity)
    except CacheCorrupt as error:
        problem = str(error)
    except CacheError:
        return None  # nothing there, or another reference's: it will be replaced
    else:
        damage = verify(out)
        if not damage:
            return found
        problem = str(damage[0])
    # Its rows would be published anew under fresh checksums, and nobody could tell the damaged ones any more.
    print(f"{problem}\nNone of its rows are reused; those that the journal lacks are scored again.", file=sys.stderr)
    return None


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
