"""Rows and answers as few flat arrays: Ray sends an array as it lies in memory, and each by itself."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipeline.engine.process import Scored
from pipeline.engine.rows import Row
from pipeline.sketches.head_plan import HeadSketch


class Packed(NamedTuple):
    """Arrays of different lengths: one after the other in `flat`; lengths, int64, says how many numbers each has."""

    flat: np.ndarray
    lengths: np.ndarray


class PackedScored(NamedTuple):
    """As process.Scored. has_sketch: bool (rows,) or None; values, audit, grad_norm: of the rows that have one."""

    logps: Packed
    shared_tokens: int
    rescored: int
    has_sketch: np.ndarray | None = None
    values: np.ndarray | None = None
    audit: np.ndarray | None = None
    grad_norm: np.ndarray | None = None


def pack(arrays: Sequence[np.ndarray]) -> Packed:
    """At least one array, all of one dtype, each of one dimension."""
    return Packed(np.concatenate(arrays), np.array([len(array) for array in arrays], np.int64))


def unpack(packed: Packed) -> list[np.ndarray]:
    return np.split(packed.flat, np.cumsum(packed.lengths)[:-1])


def pack_rows(rows: Sequence[Row]) -> tuple[Packed, Packed]:
    """(prompts, responses) of at least one row."""
    prompts, responses = zip(*rows, strict=True)
    return pack(prompts), pack(responses)


def unpack_rows(prompts: Packed, responses: Packed) -> list[Row]:
    return list(zip(unpack(prompts), unpack(responses), strict=True))


def pack_scored(scored: Scored) -> PackedScored:
    packed = PackedScored(pack(scored.logps), scored.shared_tokens, scored.rescored)
    if not scored.sketches:
        return packed
    sketches = [sketch for sketch in scored.sketches if sketch is not None]
    packed = packed._replace(has_sketch=np.array([sketch is not None for sketch in scored.sketches]))
    if not sketches:
        return packed
    return packed._replace(
        values=np.stack([sketch.values for sketch in sketches]),
        audit=np.stack([sketch.audit for sketch in sketches]),
        grad_norm=np.array([sketch.grad_norm for sketch in sketches]),
    )


def unpack_scored(packed: PackedScored) -> Scored:
    scored = Scored(unpack(packed.logps), packed.shared_tokens, packed.rescored)
    if packed.has_sketch is None:
        return scored
    if packed.values is None or packed.audit is None or packed.grad_norm is None:
        return scored._replace(sketches=[None] * len(packed.has_sketch))
    found = zip(packed.values, packed.audit, packed.grad_norm.tolist(), strict=True)
    return scored._replace(sketches=[HeadSketch(*next(found)) if has else None for has in packed.has_sketch])
