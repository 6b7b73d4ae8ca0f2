"""What AuxDPO takes from published sketches, and that they are those of this very training; no model is loaded."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from cache import CacheIncomplete, KeySet, Sketches, open_sketches
from cache.key_set import key_array
from cache.manifest import MANIFEST, file_digest
from cache.sketches import ENGINE, NONE, canonical_json
from pipeline.data.tables import PAIR_SIDES
from pipeline.errors import RequestError
from pipeline.files import write_json
from pipeline.params import AnyVariant, AuxDPO, Trainable

NULL_WEIGHT_UNIT = "in m / (4 mean ||g||^2)"


def open_fitting(path: Path | None, *, weights: str, config: str, trainable: Trainable) -> Sketches:
    """The sketches in `path`, if they are gradients of the model with these digests over what `trainable` names.

    Raises RequestError where there are none, and where an engine took them of less than what trains; CacheMismatch
    naming the fields that differ with both values, and as open_sketches. A LoRA's random start is compared when it has
    been made: `require_adapter`.
    """
    if path is None:
        raise RequestError("auxdpo needs gradient sketches. Name their folder with --sketches.")
    found = _open_filled(path, "auxdpo").identity
    wanted = canonical_json(trainable if isinstance(trainable, str) else trainable.model_dump())
    if found.source == ENGINE and found.trainable != wanted:
        raise RequestError(
            f"{path} holds sketches that the engine took (sketch.source: engine), of {found.trainable} alone, but "
            f"trainable is {wanted}: the constraint would leave out the rest of the gradient. Set "
            "sketch.source: gradient and run `dvc repro sketch`."
        )
    expected = dataclasses.replace(found, weights=weights, config=config, trainable=wanted)
    return open_sketches(path, expect=expected)


def _open_filled(path: Path, reader: str) -> Sketches:
    """What is published there; RequestError where that is nothing, naming who would read it."""
    found = open_sketches(path, expect=None)
    if found.identity.mode == NONE:
        raise RequestError(
            f"{path} holds no sketches, which {reader} needs. Set sketch.mode: tensorsketch (or exact, for a small "
            "LoRA) and run `dvc repro sketch`."
        )
    return found


def require_responses(sketches: Sketches, pairs: pl.DataFrame, params: AuxDPO) -> None:
    """Raise CacheIncomplete unless every response of these pairs is sketched, RequestError for a rank that is no use.

    pairs: a table of PAIR_SIDES.
    """
    keys = pair_responses(pairs)
    absent = sketches.missing(keys.array)
    if absent:
        raise CacheIncomplete(sketches.incomplete(len(absent), absent, len(keys)))
    if params.constraint == "projection":
        require_rank(params.rank, responses=len(keys), width=sum(sketches.identity.widths.values()))


def require_rank(rank: int, *, responses: int, width: int) -> None:
    """RequestError for a projection that leaves no offset but zero, or that sketches of `width` numbers can't have."""
    if rank >= responses:
        raise RequestError(
            f"projection on the complement of {rank} singular vectors leaves no offset but zero, since there are "
            f"only {responses} responses: a sketch with as many numbers as responses pins every one of them. Set the "
            f"rank well below {responses} (and, to be accurate, some 4 to 16 times below the {width} numbers of a "
            "sketch)."
        )
    if not 1 <= rank <= width:
        raise RequestError(f"projection: the rank must lie in 1..{width}, the numbers of a sketch, found {rank}")


def pair_responses(pairs: pl.DataFrame) -> KeySet:
    """The distinct responses of these pairs, a table of PAIR_SIDES."""
    return KeySet(np.concatenate([key_array(pairs[side]) for side in PAIR_SIDES]))


def write_stamp(variant: str, objective: AnyVariant, sketches: Path, out: Path) -> dict[str, Any]:
    """Write what `objective` makes of the sketches to `out`: their manifest's digest, or null; returns the content.

    The norms that a null_weight is measured by are part of the digest. What it is measured in stands beside it, so that
    a policy of a time when the same number meant something else trains anew.

    Raises RequestError where it needs sketches and there are none.
    """
    content: dict[str, Any] = {"variant": variant, "sketches": None}
    if objective.needs_sketches:
        _open_filled(sketches, f"variant {variant} ({objective.objective})")
        content["sketches"] = file_digest(sketches / MANIFEST)
    if isinstance(objective, AuxDPO) and objective.null_weight is not None:
        content["null_weight"] = NULL_WEIGHT_UNIT
    write_json(out, content)
    return content
