"""Fill the sketches: find what is missing, take its gradients batch by batch, journal every batch, publish."""

import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from cache import Journal, SketchIdentity, open_sketches, publish_reference
from cache.identity import record_identity
from cache.sketches import AUDIT, NONE, sketches_table
from cache.spill import spill_folder
from pipeline.engine.rows import row_tokens
from pipeline.errors import RequestError
from pipeline.files import write_json
from pipeline.model.digests import config_digest, weights_digest
from pipeline.model.limits import model_limits, refuse_bad
from pipeline.params import ScoreParams, SketchParams, Trainable
from pipeline.progress import activity, progress_bar
from pipeline.reference.head_sketching import HeadSketches, head_sketches, sketch_by_engine
from pipeline.reference.publication import publish_needed, sound_reference
from pipeline.reference.responses import Responses, Wanted, set_bad_aside, without_rows_of
from pipeline.reference.sketch_ranks import Batch, RankJob, sketch_on_ranks
from pipeline.sketches.head_plan import HEAD_PART_ONLY
from pipeline.tokens.view import open_token_view
from pipeline.workspace import scratch_folder, sketch_journal_folder

if TYPE_CHECKING:
    from pipeline.sketches.collector import Sketched
    from pipeline.sketches.sketcher import Sketcher


def sketch_identity(
    model: Path, *, params: SketchParams, trainable: Trainable, trust_remote_code: bool = False
) -> SketchIdentity:
    """The identity that `sketch_responses` would publish. A backward pass loads the model to see what trains in it."""
    if params.mode == NONE:
        return SketchIdentity(mode=NONE)
    if params.by_engine:
        return _of_head(model, params, trust_remote_code).identity
    return _load(model, params, trainable, trust_remote_code).identity(model)


def _load(model: Path, params: SketchParams, trainable: Trainable, trust_remote_code: bool) -> "Sketcher":
    with activity(f"loading {model}"):
        from pipeline.sketches.sketcher import load_sketcher  # seconds of torch and transformers, for these modes alone

        return load_sketcher(model, params, trainable, trust_remote_code=trust_remote_code)


def _of_head(model: Path, params: SketchParams, trust_remote_code: bool) -> HeadSketches:
    with activity(f"digesting {model}"):
        digests = {"weights": weights_digest(model), "config": config_digest(model)}
        return head_sketches(model, params, **digests, trust_remote_code=trust_remote_code)


@dataclass
class _Work:
    """What this run sketched; tokens: of prompts and responses."""

    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0


def sketch_responses(
    *,
    pairs: Path,
    model: Path,
    out: Path,
    metrics: Path,
    params: SketchParams,
    trainable: Trainable,
    score: ScoreParams | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Make `out` hold the gradient sketches of exactly the training responses in `pairs`; returns the metrics' content.

    Only rows that neither `out` nor the journal holds are sketched. With mode "none" `out` says that there are none.
    score: the engine, for source "engine"; None for its defaults. Raises RequestError for rows that the model can't
    take and for a `trainable` that can't be sketched, RunFailed for gradients that are not finite and rows that end
    engines, CacheLocked while another process sketches.
    """
    if params.mode == NONE:
        identity = SketchIdentity(mode=params.mode)
        publish_reference(out, identity.kind.schema.empty_table(), identity)
        content: dict[str, Any] = {"mode": params.mode, "responses": 0, "rows_sketched": 0}
        write_json(metrics, content)
        return content
    with spill_folder(scratch_folder()) as scratch:
        responses = Responses([open_token_view(pairs)], scratch / "pairs")
        train = Wanted(responses, np.array(responses.train))
        if not len(train):
            raise RequestError(f"{pairs} has no training responses to sketch. Add pairs, or lower prepare.test_share.")
        _, bad = set_bad_aside([train], model_limits(model, trust_remote_code=trust_remote_code), model)
        refuse_bad(bad)
        identity, sketch = _source(
            model, params, trainable, score or ScoreParams(dtype=params.dtype), trust_remote_code
        )
        with Journal(sketch_journal_folder() / identity.reference_id, identity.kind) as journal:
            record_identity(journal.path.parent, identity)
            (missing,) = without_rows_of([journal], [train], scratch / "journalled")
            published = sound_reference(out, identity) if len(missing) else None
            stored = [published] if published else []
            (missing,) = without_rows_of(stored, [missing], scratch / "published")
            work = sketch(missing, journal) if len(missing) else _Work()
            publish_needed(out, responses.key_set(train.chosen), [journal, *stored], identity)
        content = _summary(out, identity, len(train), work)
    write_json(metrics, content)
    return content


def _source(
    model: Path, params: SketchParams, trainable: Trainable, score: ScoreParams, trust_remote_code: bool
) -> tuple[SketchIdentity, Callable[[Wanted, Journal], _Work]]:
    """The identity of the sketches, and what computes and journals missing ones."""
    if params.by_engine:
        head = _of_head(model, params, trust_remote_code)
        if head.tied:
            print(f"Warning: {model}: {HEAD_PART_ONLY}", file=sys.stderr)

        def by_engine(missing: Wanted, journal: Journal) -> _Work:
            missing = replace(missing, among=missing.chosen, sketched=missing.of.all)
            seconds = sketch_by_engine(missing, model, head, score, journal, trust_remote_code=trust_remote_code)
            return _Work(len(missing), missing.tokens, seconds)

        return head.identity, by_engine
    sketcher = _load(model, params, trainable, trust_remote_code)
    job = RankJob(model, params, trainable, trust_remote_code)
    identity = sketcher.identity(model)
    return identity, lambda missing, journal: _sketch_missing(missing, sketcher, journal, job, identity)


def _sketch_missing(
    missing: Wanted, sketcher: "Sketcher", journal: Journal, job: RankJob, identity: SketchIdentity
) -> _Work:
    began = time.perf_counter()
    work = _Work(len(missing), missing.tokens)
    batches = (
        (batch, list(batch.select("prompt_ids", "response_ids").iter_rows()))
        for batch in missing.batches(job.params.batch_tokens)
    )
    with (
        progress_bar("sketch", work.rows, tokens=work.tokens) as advance,
        closing(_sketched(batches, sketcher, job, identity)) as answers,
    ):
        for batch, sketched in answers:
            values = {group: numbers.numpy() for group, numbers in sketched.values.items()}
            values[AUDIT] = sketched.audit.numpy()
            journal.append(sketches_table(batch["response_key"].to_list(), sketched.grad_norm.numpy(), values))
            advance(len(batch), row_tokens(batch))
    work.seconds = time.perf_counter() - began
    return work


def _sketched(
    batches: Iterator[Batch], sketcher: "Sketcher", job: RankJob, identity: SketchIdentity
) -> Generator[tuple[pl.DataFrame, "Sketched"], None, None]:
    """Every batch with its sketches: here, or on as many processes or actors as sketch.ranks says."""
    if job.params.ranks == 1 and job.params.workers == "local":
        with sketcher:
            for batch, sequences in batches:
                yield batch, sketcher(sequences)
        return
    sketcher.model.to("meta")  # it has served the identity, and would take the memory of a rank
    yield from sketch_on_ranks(job, batches, identity)


def _summary(out: Path, identity: SketchIdentity, responses: int, work: _Work) -> dict[str, Any]:
    sketches = open_sketches(out, expect=identity)
    norms = np.concatenate([table["grad_norm"].to_numpy() for table in sketches.tables(["grad_norm"])])
    stored = sum(shard.bytes for shard in sketches.manifest.shards)
    per_second = 1 / work.seconds if work.seconds else 0.0
    return {
        "mode": identity.mode,
        "source": identity.source or "gradient",
        "responses": responses,
        "rows_sketched": work.rows,
        "rows_reused": responses - work.rows,
        "tokens_sketched": work.tokens,
        "seconds": round(work.seconds, 3),
        "rows_per_second": round(work.rows * per_second, 3),
        "tokens_per_second": round(work.tokens * per_second, 1),
        "numbers_per_row": sum(identity.widths.values()) + (identity.audit or 0),
        "bytes_per_row": round(stored / responses, 1),
        "grad_norm": {
            "mean": float(norms.mean(dtype=np.float64)),
            **{f"p{q:02d}": float(np.quantile(norms, q / 100)) for q in (1, 50, 99)},
            "max": float(norms.max()),
        },
        "reference_id": identity.reference_id,
        "identity": identity.to_dict(),
    }
