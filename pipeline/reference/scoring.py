"""Fill the reference cache: find what is missing, score it with vLLM, journal every call, publish, measure drift."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from cache import Journal, ReferenceIdentity, RowSource, open_reference
from cache.identity import record_identity
from cache.spill import spill_folder
from pipeline.cluster.scoring_engines import scoring_engines
from pipeline.data.tables import pair_sides
from pipeline.engine.process import orderly_termination
from pipeline.engine.rows import scored_table
from pipeline.engine.supervision import Quarantined, SupervisedEngines
from pipeline.errors import RequestError
from pipeline.files import write_json
from pipeline.model.limits import BadRows, model_limits
from pipeline.params import ScoreParams, SketchParams
from pipeline.progress import activity, progress_bar
from pipeline.reference import drift
from pipeline.reference.head_sketching import HeadSketches, head_journal, head_sketches
from pipeline.reference.identity import reference_identity
from pipeline.reference.publication import adopt, publish_needed, recorded_rows, sound_reference
from pipeline.reference.responses import Responses, Wanted, set_bad_aside, without_rows_of
from pipeline.reference.suites import SuiteResponses
from pipeline.reference.unscorable import Folders, announce, refuse
from pipeline.tokens.view import open_token_view
from pipeline.workspace import journal_folder, rescored_folder, scratch_folder


@dataclass
class _Work:
    """What this run scored. tokens: of prompts and responses; seconds: with engines replaced, without the first start,
    which is engine_start.

    bad: rows that the model can't take; quarantined: rows that end engines. sketched: rows with a sketch of the head.
    engines: that answered, replacements not counted.
    """

    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0
    engine_start: float = 0.0
    rescored: int = 0
    shared_tokens: int = 0
    restarts: int = 0
    sketched: int = 0
    engines: int = 0
    backend: str | None = None
    bad: BadRows = field(default_factory=BadRows)
    quarantined: Sequence[Quarantined] = ()


def score_responses(
    *,
    pairs: Path,
    model: Path,
    out: Path,
    metrics: Path,
    params: ScoreParams,
    trainer_dtype: str,
    drift_tolerance: float | None = None,
    trust_remote_code: bool = False,
    sketch: SketchParams | None = None,
    suites: Path | None = None,
    suites_out: Path | None = None,
) -> dict[str, Any]:
    """Make `out` hold the log-probs of exactly the responses in `pairs` under `model`; returns the metrics' content.

    Only rows that neither `out` nor the journals hold are scored; without any, no engine is started. trainer_dtype:
    what `train` computes in, for the drift; drift_tolerance: see `drift.ensure_drift`. sketch: with source "engine",
    the training responses among these rows are sketched by the same pass, and journalled for the `sketch` stage.
    suites: prepared ones, whose responses are scored in the same run and published to `suites_out`. Where rows can't be
    scored, all others are scored and journalled, what is published stays as it was, and then RequestError (rows that
    the model can't take) or RunFailed (rows that end engines) names them. RunFailed also where engines can't be kept
    alive, CacheLocked while another process scores or sketches.
    """
    with orderly_termination(), spill_folder(scratch_folder()) as scratch:
        responses = Responses([open_token_view(pairs)], scratch / "pairs")
        if not len(responses):
            raise RequestError(f"{pairs} has no responses to score. Run `dvc repro prepare` on data with pairs.")
        beside_pairs = SuiteResponses(suites, suites_out, scratch / "suites")
        folders = {"": pairs, **beside_pairs.folders}
        with activity(f"digesting {model}"):
            identity = reference_identity(model, dtype=params.dtype, quantization=params.quantization)
        needed = responses.key_set()
        wanted = [Wanted(responses, responses.all, sketched=responses.train), beside_pairs.besides(needed)]
        total = sum(map(len, wanted))
        with (
            Journal(journal_folder() / identity.reference_id) as journal,
            Journal(rescored_folder(identity.reference_id)) as rescored,
        ):
            record_identity(journal.path.parent, identity)
            missing = without_rows_of([rescored, journal], wanted, scratch / "journalled")
            recorded = (recorded_rows(out, identity.reference_id) & needed) - rescored.key_set()
            published = sound_reference(out, identity) if len(recorded) or any(map(len, missing)) else None
            if published and len(recorded):
                adopt(recorded, rescored, published)
            stored = [published] if published else []
            missing = without_rows_of(stored, missing, scratch / "published")
            of_suites = beside_pairs.published(identity) if any(map(len, missing)) else []
            missing = without_rows_of(of_suites, missing, scratch / "published-suites")
            work = _Work()
            if any(map(len, missing)):
                with _sketches_beside(model, identity, sketch, trust_remote_code) as beside:
                    work = _score_missing(missing, model, params, trust_remote_code, journal, folders, beside, identity)
            outs = [out, *beside_pairs.outs]
            refuse(work.bad, work.quarantined, folders=folders, out=outs, total=total, model=model)
            published_from = time.perf_counter()
            sources: list[RowSource] = [rescored, journal, *stored, *of_suites]
            publish_needed(out, needed, sources, identity)
            beside_pairs.publish(sources, identity)
            measured_from = time.perf_counter()
            measured = drift.ensure_drift(
                out,
                model,
                responses=responses,
                pairs=pair_sides(pairs),
                reference=open_reference(out, expect=identity),
                trainer_dtype=trainer_dtype,
                sample_size=params.drift_sample,
                trust_remote_code=trust_remote_code,
                tolerance=drift_tolerance,
                rescored=rescored.key_set() & needed,
            )
            ended = time.perf_counter()
        parts = {"engine_start": work.engine_start, "scoring": work.seconds}
        parts |= {"publication": measured_from - published_from, "drift": ended - measured_from}
        return _write_metrics(metrics, responses, total, work, parts, identity, measured)


_Beside = tuple[HeadSketches, Journal] | None


@contextmanager
def _sketches_beside(
    model: Path, identity: ReferenceIdentity, params: SketchParams | None, trust_remote_code: bool
) -> Iterator[_Beside]:
    """What the engine sketches while it scores, and where to; None unless that was asked for."""
    if params is None or not params.by_engine:
        yield None
        return
    assert params.dtype == identity.dtype  # params.py has compared them
    digests = {"weights": identity.weights, "config": identity.config}
    sketches = head_sketches(model, params, **digests, trust_remote_code=trust_remote_code)
    with head_journal(sketches) as journal:
        yield sketches, journal


def _score_missing(
    missing: Sequence[Wanted],
    model: Path,
    params: ScoreParams,
    trust_remote_code: bool,
    journal: Journal,
    folders: Folders,
    beside: _Beside,
    identity: ReferenceIdentity,
) -> _Work:
    """Score and journal what can be scored, part after part; the rest is in the answer."""
    began = time.perf_counter()
    rows = sum(map(len, missing))
    with (
        scoring_engines(params, rows, model, identity) as engines,
        SupervisedEngines(model, params, engines, rows=rows, trust_remote_code=trust_remote_code) as engine,
    ):
        limits = model_limits(model, trust_remote_code=trust_remote_code)
        missing, bad = set_bad_aside(missing, limits, model)
        if bad:
            announce(bad, folders)
        rows = sum(map(len, missing))
        if not rows:
            return _Work(bad=bad)
        longest = max(part.longest for part in missing)
        backend = engine.load_for(longest, limits, beside[0].plan if beside else None)
        tokens = sum(part.tokens for part in missing)
        work = _Work(rows, tokens, backend=backend, bad=bad, quarantined=engine.quarantined)
        started = time.perf_counter()
        work.engine_start = started - began
        with progress_bar("score", work.rows, tokens=work.tokens) as advance:
            planned = chain.from_iterable(part.calls(params.rows_per_call) for part in missing)
            for call in engine.score(planned, advance):
                if beside:  # first: a row whose log-probs are journalled is never asked of an engine again
                    sketches, sketch_journal = beside
                    work.sketched += sketches.append(call, sketch_journal)
                journal.append(scored_table(call.rows, call.inputs, call.answer.logps))
                work.rescored += call.answer.rescored
                work.shared_tokens += call.answer.shared_tokens
        work.seconds, work.restarts = time.perf_counter() - started, engine.restarts
        work.engines = engine.answered
        return work


def _write_metrics(
    file: Path,
    responses: Responses,
    rows: int,
    work: _Work,
    parts: dict[str, float],
    identity: ReferenceIdentity,
    measured: dict[str, Any],
) -> dict[str, Any]:
    """rows: distinct responses of pairs and suites; responses: those of the pairs."""
    per_second = 1 / work.seconds if work.seconds else 0.0
    content = {
        "responses": len(responses),
        "responses_of_suites_alone": rows - len(responses),
        "rows_scored": work.rows,
        "rows_reused": rows - work.rows,
        "tokens_scored": work.tokens,
        "response_tokens": responses.response_tokens,
        "seconds": round(work.seconds, 3),
        "seconds_by_part": {name: round(seconds, 3) for name, seconds in parts.items()},
        "rows_per_second": round(work.rows * per_second, 3),
        "tokens_per_second": round(work.tokens * per_second, 1),
        "backend": work.backend,
        "engines": work.engines,
        "engine_restarts": work.restarts,
        "rows_rescored": work.rescored,
        "prompt_tokens_shared": work.shared_tokens,
        "rows_sketched": work.sketched,
        "reference_id": identity.reference_id,
        "identity": identity.to_dict(),
        "drift": drift.summary(measured),
    }
    write_json(file, content)
    return content
