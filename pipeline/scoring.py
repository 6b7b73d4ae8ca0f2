"""Fill the reference cache: find what is missing, score it with vLLM, journal every call, publish, measure drift."""

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa

from cache import Journal, ReferenceIdentity, logps_table, open_reference
from cache.identity import record_identity
from pipeline import drift
from pipeline.engine_process import EngineProcess, orderly_termination
from pipeline.errors import RequestError
from pipeline.params import ScoreParams
from pipeline.prepared_data import read_pairs, read_responses
from pipeline.progress import activity, progress_bar
from pipeline.publication import publish_needed, sound_reference
from pipeline.rescored import adopt, recorded_rows
from pipeline.scoring_plan import (
    ROW_COLUMNS,
    calls,
    check_rows,
    engine_length,
    engine_rows,
    longest_row,
    model_limits,
    scoring_order,
)
from pipeline.weights import reference_identity
from pipeline.workspace import journal_folder, log_file, rescored_folder


class _Work(NamedTuple):
    """What this run scored. tokens: of prompts and responses; seconds: without the engine's start."""

    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0


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
) -> dict[str, Any]:
    """Make `out` hold the log-probs of exactly the responses in `pairs` under `model`; returns the metrics' content.

    Only rows that neither `out` nor the journals hold are scored; without any, no engine is started. trainer_dtype:
    what `train` computes in, for the drift; drift_tolerance: see `drift.ensure_drift`. Raises RequestError before the
    model loads if a row can't be scored, RunFailed if the engine dies (rows journalled until then are kept),
    CacheLocked while another process scores.
    """
    responses = read_responses(pairs)
    if responses.is_empty():
        raise RequestError(f"{pairs} has no responses to score. Run `dvc repro prepare` on data with pairs.")
    with activity(f"digesting {model}"):
        identity = reference_identity(model, dtype=params.dtype, quantization=params.quantization)
    rows = scoring_order(responses.select(ROW_COLUMNS))
    needed = set(rows["response_key"])
    with (
        orderly_termination(),
        Journal(journal_folder() / identity.reference_id) as journal,
        Journal(rescored_folder(identity.reference_id)) as rescored,
    ):
        record_identity(journal.path.parent, identity)
        recorded = recorded_rows(out, identity.reference_id) & needed - rescored.keys()
        journalled = journal.keys() | rescored.keys()
        published = sound_reference(out, identity) if recorded or needed - journalled else None
        if published and recorded:
            adopt(recorded, rescored, published)
        known = journalled | (published.keys() if published else set())
        missing = rows.filter(~pl.col("response_key").is_in(known)) if known else rows
        work = _score_missing(missing, model, params, trust_remote_code, journal) if len(missing) else _Work()
        publish_needed(out, needed, [rescored, journal, *([published] if published else [])], identity)
        measured = drift.ensure_drift(
            out,
            model,
            responses=responses,
            pairs=read_pairs(pairs),
            reference=open_reference(out, expect=identity),
            trainer_dtype=trainer_dtype,
            sample_size=params.drift_sample,
            trust_remote_code=trust_remote_code,
            tolerance=drift_tolerance,
            rescored=needed & rescored.keys(),
        )
    return _write_metrics(metrics, responses, work, identity, measured)


def _score_missing(
    missing: pl.DataFrame, model: Path, params: ScoreParams, trust_remote_code: bool, journal: Journal
) -> _Work:
    tokens = missing.select(pl.col("prompt_ids", "response_ids").list.len().sum()).sum_horizontal().item()
    with EngineProcess(params, log=log_file("score")) as engine:
        limits = model_limits(model, trust_remote_code=trust_remote_code)
        check_rows(missing, limits, model)
        length = engine_length(longest_row(missing), limits, params, what="responses with their prompts")
        engine.load(model, length, trust_remote_code=trust_remote_code)
        started = time.perf_counter()
        with progress_bar("score", len(missing), tokens=tokens) as advance:
            for call in calls(missing, params.rows_per_call):
                inputs = engine_rows(call)
                journal.append(scored_table(call, inputs, engine.score(inputs, advance).logps))
        return _Work(len(missing), tokens, time.perf_counter() - started)


def scored_table(call: pl.DataFrame, inputs: list[tuple[np.ndarray, np.ndarray]], logps: list[np.ndarray]) -> pa.Table:
    """Rows for the journal out of one call: `inputs` and `logps` are in the order of `call`'s rows."""
    return logps_table(
        response_keys=call["response_key"].to_list(),
        prompt_keys=call["prompt_key"].to_list(),
        n_prompt_tokens=[len(prompt) for prompt, _ in inputs],
        token_ids=[response for _, response in inputs],
        token_logps=logps,
    )


def _write_metrics(
    file: Path, responses: pl.DataFrame, work: _Work, identity: ReferenceIdentity, measured: dict[str, Any]
) -> dict[str, Any]:
    per_second = 1 / work.seconds if work.seconds else 0.0
    content = {
        "responses": len(responses),
        "rows_scored": work.rows,
        "rows_reused": len(responses) - work.rows,
        "tokens_scored": work.tokens,
        "response_tokens": int(responses["response_ids"].list.len().sum()),
        "seconds": round(work.seconds, 3),
        "rows_per_second": round(work.rows * per_second, 3),
        "tokens_per_second": round(work.tokens * per_second, 1),
        "reference_id": identity.reference_id,
        "identity": identity.to_dict(),
        "drift": drift.summary(measured),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n")
    return content
