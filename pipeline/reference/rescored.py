"""Rows that transformers scored again in float32: they take precedence over the engine's, on every machine.

Their journal lies outside DVC's outputs and does not travel with a clone; drift.json does, and names them.
"""

from collections.abc import Collection
from pathlib import Path

from cache import Journal, Reference
from pipeline.reference.drift import read_drift

_ROWS_PER_FRAME = 2000


def recorded_rows(out: Path, reference_id: str) -> set[bytes]:
    """Keys of the rows published at `out` that drift.json says were rescored; none if it is of another reference."""
    content = read_drift(out) or {}
    if content.get("reference_id") != reference_id:
        return set()
    return {bytes.fromhex(key) for key in content.get("rescored_keys", [])}


def adopt(keys: Collection[bytes], journal: Journal, published: Reference) -> None:
    """Copy those of `keys` that `published` has and the journal of rescored rows lacks from the one to the other.

    In a clone that scored this reference itself, the engine's journalled rows would otherwise come back.
    """
    wanted = sorted(set(keys) - journal.keys())
    absent = set(published.missing(wanted))
    wanted = [key for key in wanted if key not in absent]
    for start in range(0, len(wanted), _ROWS_PER_FRAME):
        journal.append(published.rows(wanted[start : start + _ROWS_PER_FRAME]).to_arrow())
