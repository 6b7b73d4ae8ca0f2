"""Sketches of the output head's gradient from the engine that scores: one forward gives them and the log-probs.

`score` journals them beside its own rows, and `sketch` publishes them; what it finds missing it has computed by an
engine of its own. No torch is loaded before the model is looked at.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cache import Journal, SketchIdentity
from cache.identity import record_identity
from cache.sketches import AUDIT, ENGINE, canonical_json, sketches_table
from pipeline.cluster.scoring_engines import scoring_engines
from pipeline.engine.process import orderly_termination
from pipeline.engine.supervision import ScoredCall, SupervisedEngines
from pipeline.errors import RunFailed
from pipeline.model.limits import model_limits
from pipeline.params import ScoreParams, SketchParams
from pipeline.progress import progress_bar
from pipeline.reference.responses import Wanted
from pipeline.sketches.head_plan import HEAD, HEAD_PART, HeadPlan
from pipeline.workspace import sketch_journal_folder


class HeadSketches(NamedTuple):
    """What the engine is to sketch of a model, under which identity."""

    plan: HeadPlan
    identity: SketchIdentity

    @property
    def tied(self) -> bool:
        return HEAD_PART in self.identity.widths

    def append(self, call: ScoredCall, journal: Journal) -> int:
        """Journal the sketches that a call came with; returns how many."""
        answered = [(key, s) for key, s in zip(call.rows["response_key"], call.answer.sketches, strict=True) if s]
        if answered:
            keys, sketches = zip(*answered, strict=True)
            (group,) = self.identity.widths
            values = {group: np.stack([s.values for s in sketches]), AUDIT: np.stack([s.audit for s in sketches])}
            norms = np.array([s.grad_norm for s in sketches], np.float32)
            journal.append(sketches_table(list(keys), norms, values))
        return len(answered)


def head_sketches(
    model: Path, params: SketchParams, *, weights: str, config: str, trust_remote_code: bool = False
) -> HeadSketches:
    """Sketches of this folder's output head; weights, config: digests. RequestError for a head that isn't linear.

    The identity says what the sketches are of, whatever `trainable` is: the head or, where it is tied to the
    embeddings, its part of their common gradient, which is the gradient of nothing that trains.
    """
    from pipeline.forward.saved_head import head_parameters
    from pipeline.sketches.hashes import HASH_VERSION

    names, tied = head_parameters(model, trust_remote_code=trust_remote_code)
    identity = SketchIdentity(
        weights=weights,
        config=config,
        trainable=canonical_json({HEAD_PART: names["weight"]} if tied else HEAD),
        mode=params.mode,
        k=params.k,
        audit=params.audit,
        seed=params.seed,
        hash_version=HASH_VERSION,
        dtype=params.dtype,
        groups=canonical_json({HEAD_PART if tied else HEAD: params.k}),
        source=ENGINE,
    )
    return HeadSketches(HeadPlan(names, params.k, params.audit, params.seed), identity)


@contextmanager
def head_journal(sketches: HeadSketches) -> Iterator[Journal]:
    """The journal of these sketches, which `sketch` publishes from. Raises CacheLocked while another one writes."""
    identity = sketches.identity
    with Journal(sketch_journal_folder() / identity.reference_id, identity.kind) as journal:
        record_identity(journal.path.parent, identity)
        yield journal


def sketch_by_engine(
    missing: Wanted,
    model: Path,
    sketches: HeadSketches,
    score: ScoreParams,
    journal: Journal,
    *,
    trust_remote_code: bool = False,
) -> float:
    """Sketch and journal rows that `score` did not; returns seconds without the engine's start.

    missing: rows that the model can take, all of them to be sketched. Raises RunFailed where rows end engines, once all
    others are journalled, and as SupervisedEngines.
    """
    assert score.dtype == sketches.identity.dtype  # params.py has compared them
    limits = model_limits(model, trust_remote_code=trust_remote_code)
    with (
        orderly_termination(),
        scoring_engines(score, len(missing), model, sketches.identity) as engines,
        SupervisedEngines(model, score, engines, rows=len(missing), trust_remote_code=trust_remote_code) as engine,
    ):
        engine.load_for(missing.longest, limits, sketches.plan)
        began = time.perf_counter()
        with progress_bar("sketch", len(missing), tokens=missing.tokens) as advance:
            for call in engine.score(missing.calls(score.rows_per_call), advance):
                sketches.append(call, journal)
    if engine.quarantined:
        first = engine.quarantined[0]
        raise RunFailed(
            f"{len(engine.quarantined)} of {len(missing)} responses ended three engines each, so they have no sketch, "
            f"the first of them {first.key.hex()} ({first.log}). All others are journalled. Remove the pairs of such "
            "rows, or set sketch.source: gradient."
        )
    return time.perf_counter() - began
