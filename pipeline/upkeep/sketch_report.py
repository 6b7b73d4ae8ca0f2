"""Whether a published sketch is large enough: the numbers behind `refcache sketch-report`."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cache import KeySet, Sketches, SketchIdentity, open_sketches
from cache.sketches import AUDIT, NONE, group_values, scale_column
from pipeline.errors import RequestError
from pipeline.progress import progress_bar
from pipeline.sketches.head_plan import HEAD_PART, HEAD_PART_ONLY
from pipeline.upkeep.sketch_spectrum import (
    Array,
    Spectrum,
    decompose,
    effective_dimension,
    fitted_ratio,
    numbers_for,
    penalty_scale,
    predicted_ratio,
    true_dimension,
)

MOST_ROWS = 8192  # of one Gram matrix: 0.5 GB, and as much again three times while it is taken apart
SLICE_BYTES = 128 << 20  # of one group's float64 numbers in memory at a time
SHOWN = 10  # leading eigenvalues
ENOUGH = 0.88  # share of the true penalty that a large enough sketch shows: N of 16 effective dimensions
POOR = 0.5  # below, fitted offsets are hardly held
SURPRISING = 1.5  # measured over predicted error
RANK_SHARE = 4  # numbers of a sketch to a constrained direction; leading directions beyond are the sketch's own noise


class _Rows(NamedTuple):
    """gram: (n, n); audit: (n, audit width); energy: {group: (n,) squared norms of sketches}; norms: (n,), exact."""

    gram: Array
    audit: Array
    energy: dict[str, Array]
    norms: Array


def report_sketches(
    path: Path,
    *,
    null_weights: Sequence[float] = (),
    absolute: Sequence[float] = (),
    ridge: float = 0.0,
    rows: int = 2048,
    seed: int = 0,
) -> dict[str, Any]:
    """Spectrum, effective dimensions, errors and suggestions for the sketches in folder `path`, ready for JSON.

    null_weights, absolute (null_weight_absolute; at least one number in the two), ridge: of AuxDPO's loss
    (docs/auxdpo.md), as if every row were a response of the training pairs. Above `rows` rows a sample of that many is
    used: keys are digests, so the run of keys from a place that `seed` determines is as good as drawn. Takes 8 rows^2
    bytes four times over, and time with the cube of the rows. Raises as `cache.open_sketches`, and RequestError for an
    empty publication, for gradients of zero alone and for more than MOST_ROWS rows.
    """
    if not 2 <= rows <= MOST_ROWS:
        raise RequestError(
            f"--rows {rows:,}: a Gram matrix of 2 to {MOST_ROWS:,} rows is taken; more are sampled. Ask for fewer."
        )
    sketches = open_sketches(path, expect=None)
    if sketches.identity.mode == NONE or not sketches.n_rows:
        raise RequestError(
            f"{path} holds no sketches (sketch.mode {sketches.identity.mode}), so there is nothing to report. Set "
            "sketch.mode: tensorsketch in params.yaml and run `dvc repro sketch`."
        )
    chosen = sample_keys(sketches.key_set(), rows, seed)
    found = _read(sketches, chosen)
    spectrum = decompose(found.gram, found.audit)
    numbers = effective_numbers(sketches.identity, found.energy)
    unit = _penalty_unit(sketches.n_rows, found.norms)
    weights = sorted([*(weight * unit for weight in null_weights), *absolute])
    penalties = [_penalty(spectrum, len(chosen), numbers, weight, ridge, unit) for weight in weights]
    content = {
        "path": str(path),
        "reference_id": sketches.identity.reference_id,
        "mode": sketches.identity.mode,
        "source": sketches.identity.source or "gradient",
        "trainable": sketches.identity.trainable,
        "rows": sketches.n_rows,
        "rows_used": len(chosen),
        "seed": seed if len(chosen) < sketches.n_rows else None,
        **_sizes(sketches.identity, found.energy, numbers),
        "spectrum": _spectrum(spectrum, found, numbers),
        "errors": _errors(sketches.identity, found),
        "penalties": penalties,
        "suggested": _suggested(sketches.identity, found.energy, penalties[-1], numbers, len(chosen)),
    }
    return content | {"warnings": list(_warnings(content))}


def sample_keys(keys: KeySet, rows: int, seed: int) -> KeySet:
    """At most `rows` of `keys`: a run in their order, from a place that `seed` determines, so that few are read."""
    if len(keys) <= rows:
        return keys
    start = int(np.random.default_rng(seed).integers(len(keys)))
    return KeySet(np.take(keys.array, np.arange(start, start + rows), mode="wrap"))


def _read(sketches: Sketches, chosen: KeySet) -> _Rows:
    """One pass over the rows for each slice of a group's numbers; nothing but the sums stays."""
    n, identity = len(chosen), sketches.identity
    gram, energy = np.zeros((n, n)), {group: np.zeros(n) for group in identity.widths}
    step = max(1, SLICE_BYTES // (8 * n))
    slices = [(g, slice(at, at + step)) for g, width in identity.widths.items() for at in range(0, width, step)]
    with progress_bar("spectrum", len(slices)) as advance:
        for group, numbers in slices:
            part = _numbers(sketches, chosen, group, numbers)
            gram += part @ part.T
            energy[group] += np.square(part).sum(axis=1)
            advance(1)
    norms = [table["grad_norm"].to_numpy() for _, table in sketches.matching(chosen, ["grad_norm"])]
    return _Rows(gram, _numbers(sketches, chosen, AUDIT, slice(None)), energy, np.concatenate(norms).astype(np.float64))


def _numbers(sketches: Sketches, chosen: KeySet, group: str, numbers: slice) -> Array:
    """(n, numbers) of the group, in the order of the keys, as they are stored."""
    tables = (table for _, table in sketches.matching(chosen, [group, scale_column(group)]))
    return np.concatenate([group_values(table, group)[:, numbers].astype(np.float64) for table in tables])


def effective_numbers(identity: SketchIdentity, energy: dict[str, Array]) -> float:
    """N = 1 / sum over groups of share^2 / k: as many numbers of one group would err as much; inf for exact rows.

    Groups are sketched independently, so the relative variance of a squared norm, 2 / k in each, adds up by the squares
    of the groups' shares of the energy.
    """
    if identity.k is None:
        return math.inf
    totals = np.array([each.sum() for each in energy.values()])
    return float(identity.k / np.square(totals / totals.sum()).sum()) if totals.any() else float(identity.k)


def _sizes(identity: SketchIdentity, energy: dict[str, Array], numbers: float) -> dict[str, Any]:
    total = sum(each.sum() for each in energy.values()) or 1.0
    return {
        "numbers": sum(identity.widths.values()),
        "effective_numbers": None if math.isinf(numbers) else numbers,
        "groups": {g: {"numbers": w, "energy": float(energy[g].sum() / total)} for g, w in identity.widths.items()},
    }


def _spectrum(spectrum: Spectrum, found: _Rows, numbers: float) -> dict[str, Any]:
    """Energies are shares of the sum of squared gradient norms, which is exact."""
    exact = float(np.square(found.norms).sum()) or 1.0
    ranks = [rank for rank in (2**i for i in range(16)) if rank < min(len(found.norms), 2 * numbers)]
    return {
        "energy": exact / len(found.norms),
        "stable_rank": exact / float(spectrum.values[0]) if spectrum.values[0] else 0.0,
        "leading": [float(value) / exact for value in spectrum.values[:SHOWN]],
        "tail": [{"rank": rank, **dict(zip(("sketch", "audit"), spectrum.tail(rank), strict=True))} for rank in ranks],
    }


def _errors(identity: SketchIdentity, found: _Rows) -> dict[str, dict[str, float]]:
    """Errors of single rows' squared norms, relative to the exact ones; rows without gradient are left out."""
    seen = found.norms > 0
    if not seen.any():
        return {}
    exact, squares = np.square(found.norms[seen]), np.array([each[seen] for each in found.energy.values()])
    shares = squares / squares.sum(axis=0).clip(min=np.finfo(np.float64).tiny)  # (groups, rows)
    variance = 0.0 if identity.k is None else float(2 / identity.k * np.square(shares).sum(axis=0).mean())
    audit = np.square(found.audit[seen]).sum(axis=1)
    return {
        "sketch": _error(squares.sum(axis=0) / exact, math.sqrt(variance)),
        "audit": _error(audit / exact, math.sqrt(2 / (identity.audit or 1))),
    }


def _error(ratio: Array, predicted: float) -> dict[str, float]:
    off = ratio - 1
    measured = float(np.sqrt(np.square(off).mean()))
    return {"predicted": predicted, "measured": measured, "mean": float(off.mean()), "worst": float(np.abs(off).max())}


def _penalty_unit(responses: int, norms: Array) -> float:
    """m / (4 mean ||g||^2) of all rows, by these norms; RequestError where they are all zero."""
    mean_square = float(np.square(norms).mean())
    if not mean_square:
        raise RequestError(
            f"All {len(norms):,} gradients that were read are zero, so there is nothing to constrain. Choose a "
            "`trainable` that the log-probs depend on and run `dvc repro sketch`."
        )
    return responses / (4 * mean_square)


def _penalty(spectrum: Spectrum, n: int, numbers: float, weight: float, ridge: float, unit: float) -> dict[str, Any]:
    mu = penalty_scale(n, weight, ridge)
    own = effective_dimension(spectrum.values, mu)
    return {
        "null_weight": weight / unit,
        "null_weight_absolute": weight,
        "ridge": ridge,
        "mu": mu,
        "dimension_of_sketch": own,
        "dimension": true_dimension(spectrum.values, numbers, mu),
        "predicted_ratio": predicted_ratio(own, numbers),
        "measured_ratio": fitted_ratio(spectrum, mu),
    }


def _suggested(
    identity: SketchIdentity, energy: dict[str, Array], penalty: dict[str, Any], numbers: float, n: int
) -> dict[str, int]:
    """k per group, a power of two, and the rank of a projection, for the largest of the null weights."""
    dimension = penalty["dimension"]
    totals = np.array([each.sum() for each in energy.values()])
    groups = totals.sum() ** 2 / np.square(totals).sum() if totals.any() else 1.0  # that count, by their energy
    if dimension is None:
        k = 4 * (identity.k or 0)  # how much more it takes can't be seen from here
    else:
        k = 2 ** math.ceil(math.log2(max(2.0, numbers_for(dimension, ENOUGH) / groups)))
    most = min(n / 2, numbers / RANK_SHARE)
    rank = max(1, int(min(most, penalty["dimension_of_sketch"] if dimension is None else dimension)))
    return {"k": k, "rank": rank}


def _warnings(content: dict[str, Any]) -> Iterator[str]:
    penalty, suggested = content["penalties"][-1], content["suggested"]
    weight, all_rows = f"null_weight {penalty['null_weight']:.4g}", content["rows_used"] == content["rows"]
    dimension, rows = penalty["dimension"], f"{content['rows_used']:,}"
    if HEAD_PART in content["groups"]:
        yield HEAD_PART_ONLY
    if content["effective_numbers"] and penalty["measured_ratio"] < (ENOUGH if dimension is None else POOR):
        found = "above what it can tell" if dimension is None else f"{dimension:,.0f}"
        yield (
            f"The sketch is too small: the effective dimension at {weight} is {found}, with "
            f"{content['effective_numbers']:,.0f} effective numbers. Offsets fitted to it see "
            f"{penalty['measured_ratio']:.0%} of their true penalty. Set sketch.k to {suggested['k']:,}"
            f"{' or more' if dimension is None else ''} and run `dvc repro sketch`, or lower null_weight."
        )
    if not all_rows and 4 * penalty["dimension_of_sketch"] > content["rows_used"]:
        yield (
            f"{rows} of {content['rows']:,} rows are too few: the effective dimension at {weight} is near their "
            "number, and of all rows it may be several times larger. Raise --rows."
        )
    if all_rows and dimension is not None and 2 * dimension > content["rows_used"]:
        yield (
            f"At {weight} the constraint holds {dimension:,.0f} of the {rows} offsets' directions, so AuxDPO comes "
            "close to DPO. Lower null_weight, or choose a smaller `trainable`."
        )
    for name, error in content["errors"].items():
        if error["predicted"] and error["measured"] > SURPRISING * error["predicted"]:
            yield (
                f"Squared norms by the {name} are off by {error['measured']:.1%}, expected {error['predicted']:.1%}. "
                "Responses of few tokens have gradients of low rank, which spread more (at most sqrt(3) times); beyond "
                "that something is wrong with the sketch."
            )
