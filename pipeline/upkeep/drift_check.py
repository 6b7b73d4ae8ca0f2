"""Drift on demand: every row, or a larger sample, against the trainer's own forward; flagged rows scored again.

Memory holds one chunk of rows, a byte of each other one, and some 200 of those that are flagged.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cache import CacheCorrupt, Journal, KeySet, Reference, open_reference, require_keys, verify
from cache.spill import spill_folder, stored_key_set
from pipeline.data.tables import find_sources, pair_sides
from pipeline.engine.rows import engine_rows, scored_table
from pipeline.params import ScoreParams
from pipeline.progress import progress_bar
from pipeline.reference import drift
from pipeline.reference.drift_statistics import DriftTally, difference, six_digits
from pipeline.reference.identity import open_for_model
from pipeline.reference.publication import adopt, publish_needed, recorded_rows
from pipeline.reference.responses import Responses, Wanted
from pipeline.reference.trainer_forward import TrainerForward
from pipeline.tokens.view import open_token_view
from pipeline.workspace import journal_folder, rescored_folder, scratch_folder

CHUNK_ROWS = 2000  # looked up in the reference cache at a time
JOURNAL_ROWS = 64  # rescored between two appends: what a kill can cost
LISTED_ROWS = 1000  # flagged rows that are named, the worst; all are counted and rescored
LISTED_SOURCES = 5  # of each, where many pairs share a response


class Flagged(NamedTuple):
    """A row whose drift exceeds the tolerance; own_sum: its summed log-prob by the trainer, nats."""

    key: bytes
    n_tokens: int
    drift: float
    own_sum: float


class _Scope(NamedTuple):
    """What is compared with what: the arguments of `check_reference_drift`."""

    pairs: Path
    model: Path
    dtype: str
    sample: int | None
    tolerance: float
    trust_remote_code: bool


def check_reference_drift(
    path: Path,
    *,
    pairs: Path,
    model: Path,
    trainer_dtype: str,
    sample: int | None,
    tolerance: float,
    rescore: bool,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Compare the reference cache at `path` with transformers' forward of `model` in `trainer_dtype`; ready for JSON.

    sample: how many responses of `pairs`, None for all; tolerance: nats a sequence above which a row is flagged.
    rescore: score the flagged rows in float32 with transformers, publish them, and measure drift.json anew. Returns

        responses, tokens, per_token, per_sequence, typical_margin   as in drift.json; p99 to 0.3 %
        tolerance, flagged_rows                                       rows above it, all of them counted
        flagged     [{response_key (hex), n_tokens, drift, sources}], worst first, at most LISTED_ROWS
        unchecked   rows of the reference cache that no pair uses, so that their tokens are unknown here
        rescored    None, or {rows: scored now, kept: scored by an earlier run, still_flagged: whose float32 values
                    are above the tolerance too, which is the trainer's own rounding}
        drift       drift.json's content, without its rows; None where there is none

    Raises CacheMismatch for other weights, CacheIncomplete for a response that has no row, CacheCorrupt for damage,
    and with `rescore` CacheLocked while another process scores this reference.
    """
    reference = open_for_model(path, model)
    scope = _Scope(pairs, model, trainer_dtype, sample, tolerance, trust_remote_code)
    with spill_folder(scratch_folder()) as scratch:
        responses = Responses([open_token_view(pairs)], scratch / "pairs")
        if not rescore:
            found, _ = _compare(reference, responses, scope)
            stored = drift.read_drift(path)
            return found | {"rescored": None, "drift": stored and drift.summary(stored)}
        identity = reference.identity
        with (
            Journal(journal_folder() / identity.reference_id),  # one writer: scoring and this exclude each other
            Journal(rescored_folder(identity.reference_id)) as journal,
        ):
            reference = open_reference(path, expect=identity)
            _require_sound(path)
            adopt(recorded_rows(path, identity.reference_id), journal, reference)
            found, flagged = _compare(reference, responses, scope)
            outcome = _rescore(flagged, journal, responses, scope)
            keys = stored_key_set(reference.key_tables(), scratch / "published")
            measured = _publish(reference, keys, journal, responses, scope)
    return found | {"rescored": outcome, "drift": drift.summary(measured)}


def _require_sound(path: Path) -> None:
    """A damaged row would be published anew under a fresh checksum, and nobody could tell it any more."""
    findings = verify(path)
    if findings:
        first = findings[0]
        raise CacheCorrupt(
            f"{path} has {len(findings)} findings; {first.file}: {first.problem}. Its rows can't be published anew "
            f"before that is mended. Run `refcache verify {path} --repair`, then this again."
        )


def _compare(reference: Reference, responses: Responses, scope: _Scope) -> tuple[dict[str, Any], list[Flagged]]:
    pairs = scope.pairs
    if scope.sample is None:
        chosen = Wanted(responses, responses.all)
    else:
        chosen = Wanted(responses, responses.chosen(drift.sample_rows(responses, scope.sample)))
    # A missing row is told now, not after hours.
    require_keys(reference, responses.key_batches(chosen.chosen), scratch=scratch_folder())
    tally, flagged = DriftTally(), list[Flagged]()
    forward = TrainerForward(scope.model, scope.dtype, trust_remote_code=scope.trust_remote_code)
    with progress_bar("drift", len(chosen), tokens=chosen.tokens) as advance:
        for rows in chosen.frames(CHUNK_ROWS):
            cached = reference.rows(rows["response_key"], ["token_logps"])["token_logps"]
            for key, values, row in zip(rows["response_key"], cached, engine_rows(rows), strict=True):
                own = forward(*row)
                off = tally.add(difference(values.to_numpy(), own))
                if off > scope.tolerance:
                    flagged.append(Flagged(key, len(own), off, float(own.sum(dtype=np.float64))))
                advance(1, len(row[0]) + len(row[1]))
    flagged.sort(key=lambda row: (-row.drift, row.key))
    found = {
        "path": str(reference.path),
        "reference_id": reference.identity.reference_id,
        "trainer_dtype": scope.dtype,
        **tally.statistics(),
        "typical_margin": six_digits(drift.typical_margin(pair_sides(pairs), reference)),
        "tolerance": scope.tolerance,
        "flagged_rows": len(flagged),
        "flagged": _named(flagged[:LISTED_ROWS], pairs),
        "unchecked": reference.n_rows - len(chosen) if scope.sample is None else 0,
    }
    return found, flagged


def _named(flagged: list[Flagged], pairs: Path) -> list[dict[str, Any]]:
    """The rows with the source lines of the pairs that use them."""
    sources = find_sources(pairs, [row.key for row in flagged])
    return [
        {
            "response_key": row.key.hex(),
            "n_tokens": row.n_tokens,
            "drift": six_digits(row.drift),
            "sources": sources.get(row.key, [])[:LISTED_SOURCES],
        }
        for row in flagged
    ]


def _rescore(flagged: list[Flagged], journal: Journal, responses: Responses, scope: _Scope) -> dict[str, int]:
    """Journal float32 values of the flagged rows that the journal lacks."""
    wanted = KeySet(row.key for row in flagged) - journal.key_set()
    if len(wanted):
        forward = TrainerForward(scope.model, "float32", trust_remote_code=scope.trust_remote_code)
        with progress_bar("rescore in float32", len(wanted)) as advance:
            for rows in Wanted(responses, responses.among(wanted)).frames(JOURNAL_ROWS):
                inputs = engine_rows(rows)
                journal.append(scored_table(rows, inputs, [forward(*row) for row in inputs]))
                advance(len(rows))
    trainers = {row.key: row.own_sum for row in flagged}
    still = 0
    for table in journal.tables() if flagged else ():
        for key, value in zip(table["response_key"].to_pylist(), table["sum_logp"].to_pylist(), strict=True):
            still += key in trainers and abs(value - trainers[key]) > scope.tolerance
    return {"rows": len(wanted), "kept": len(flagged) - len(wanted), "still_flagged": still}


def _publish(
    reference: Reference, keys: KeySet, journal: Journal, responses: Responses, scope: _Scope
) -> dict[str, Any]:
    """Publish the same rows, rescored ones from the journal; returns the content of drift.json, measured anew."""
    rescored = journal.key_set() & keys
    if len(rescored):
        publish_needed(reference.path, keys, [journal, reference], reference.identity)
    before = drift.read_drift(reference.path) or {}
    return drift.ensure_drift(
        reference.path,
        scope.model,
        responses=responses,
        pairs=pair_sides(scope.pairs),
        reference=open_reference(reference.path, expect=reference.identity),
        trainer_dtype=scope.dtype,
        sample_size=before.get("responses", ScoreParams.model_fields["drift_sample"].default),
        trust_remote_code=scope.trust_remote_code,
        rescored=rescored,
    )
