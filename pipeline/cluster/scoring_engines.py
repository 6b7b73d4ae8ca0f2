"""Where the engines that score run: on this machine, or as actors of a Ray cluster."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cache import ReferenceIdentity, SketchIdentity
from pipeline.cluster.remote_engine import RemoteEngine
from pipeline.cluster.session import Need, RaySession
from pipeline.engine.supervision import Engines, local_engines
from pipeline.params import ScoreParams


@contextmanager
def scoring_engines(
    params: ScoreParams, rows: int, model: Path, identity: ReferenceIdentity | SketchIdentity
) -> Iterator[Engines]:
    """As many as score.engines says, and no more than `rows` rows make calls, where score.workers says.

    identity: whose weights and config the model must have on every node. Raises RequestError where there are too few
    GPUs or CPUs, or the cluster can't be reached.
    """
    if params.workers == "local":
        yield local_engines(params, rows)
        return
    count = max(1, min(params.engines, math.ceil(rows / params.rows_per_call)))
    need = Need("score", "engines", count, params.tensor_parallel_size, params.ray)
    assert identity.weights is not None and identity.config is not None
    with RaySession(need, model, {"weights": identity.weights, "config": identity.config}) as session:
        yield Engines(count, lambda place, log: RemoteEngine(session, place, params, log=log))
