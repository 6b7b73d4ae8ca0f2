"""Mend a damaged reference cache: what is bad is moved aside, and only its rows are computed again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from cache import Finding, Journal, verify
from cache.identity import Identity
from cache.repair import damaged_files, set_aside
from pipeline.errors import RunFailed
from pipeline.params import ScoreParams, SketchParams, Trainable
from pipeline.progress import activity
from pipeline.reference.identity import reference_identity
from pipeline.reference.scoring import score_responses
from pipeline.reference.sketching import sketch_identity, sketch_responses
from pipeline.workspace import damaged_folder, journal_folder, sketch_journal_folder


class Repair(NamedTuple):
    """findings: what was wrong; nothing else is set where that is empty. moved: names of files, now in `aside`.

    summary: what `score_responses` or `sketch_responses` returned.
    """

    findings: list[Finding]
    moved: list[str]
    aside: Path | None
    summary: dict[str, Any] | None


def repair_reference(
    path: Path,
    *,
    pairs: Path,
    model: Path,
    metrics: Path,
    params: ScoreParams,
    trainer_dtype: str,
    drift_tolerance: float | None = None,
    trust_remote_code: bool = False,
) -> Repair:
    """Make the published reference cache at `path` sound: exactly the rows of `pairs` under `model`.

    Damaged shards and foreign files move to .refcache/damaged/; rows of sound shards and of the journal are reused.
    Raises CacheMismatch, with nothing changed, where the cache is of another reference than `model` and `params` name;
    CacheLocked while another process scores; and as `score_responses`.
    """
    with activity(f"digesting {model}"):
        identity = reference_identity(model, dtype=params.dtype, quantization=params.quantization)

    def score() -> dict[str, Any]:
        return score_responses(
            pairs=pairs,
            model=model,
            out=path,
            metrics=metrics,
            params=params,
            trainer_dtype=trainer_dtype,
            drift_tolerance=drift_tolerance,
            trust_remote_code=trust_remote_code,
        )

    return _repair(path, identity, journal_folder(), score)


def repair_sketches(
    path: Path,
    *,
    pairs: Path,
    model: Path,
    metrics: Path,
    params: SketchParams,
    trainable: Trainable,
    score: ScoreParams | None = None,
    trust_remote_code: bool = False,
) -> Repair:
    """Make the published sketches at `path` sound, as `repair_reference` does; raises as it and `sketch_responses`."""
    options: dict[str, Any] = {"params": params, "trainable": trainable, "trust_remote_code": trust_remote_code}
    identity = sketch_identity(model, **options)

    def sketch() -> dict[str, Any]:
        return sketch_responses(pairs=pairs, model=model, out=path, metrics=metrics, score=score, **options)

    return _repair(path, identity, sketch_journal_folder(), sketch)


def _repair(path: Path, identity: Identity, journals: Path, compute: Callable[[], dict[str, Any]]) -> Repair:
    # Under the journal's lock, so that nothing is moved while a stage is about to read or publish it.
    with Journal(journals / identity.reference_id, identity.kind):
        findings, moved = damaged_files(path, identity)
        if not findings:
            return Repair([], [], None, None)
        aside = set_aside(path, moved, damaged_folder() / identity.reference_id)
    summary = compute()
    if remaining := verify(path):
        raise RunFailed(f"{path} is still not sound: {remaining[0].file}: {remaining[0].problem}. The disk may be bad.")
    return Repair(findings, moved, aside, summary)
