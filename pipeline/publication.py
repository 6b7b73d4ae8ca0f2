"""From the journals and what is published already to a new publication of exactly the rows that the pairs need."""

import sys
from collections.abc import Sequence
from pathlib import Path

from cache import (
    CacheCorrupt,
    CacheError,
    Keys,
    KeySet,
    Reference,
    ReferenceIdentity,
    RowSource,
    open_reference,
    publish_rows,
    verify,
)
from pipeline.workspace import scratch_folder


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


def publish_needed(out: Path, keys: Keys, sources: Sequence[RowSource], identity: ReferenceIdentity) -> None:
    """Publish the rows of exactly `keys`, each from the first of `sources` that has it (see cache.publish_rows)."""
    wanted = keys if isinstance(keys, KeySet) else KeySet(keys)
    publish_rows(out, wanted, sources, identity, scratch=scratch_folder())
