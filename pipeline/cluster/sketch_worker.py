"""Gradient sketches on a node: the worker that takes them, and the stage's side of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.cluster.packed import Packed, pack, unpack
from pipeline.cluster.session import RaySession
from pipeline.params import SketchParams, Trainable
from pipeline.progress import Advance

if TYPE_CHECKING:
    from pipeline.sketches.collector import Sketched  # torch, which the stage does without until it has an answer

SILENT_SECONDS = 600.0  # of the process, not of the backward in it


class SketchJob(NamedTuple):
    """What the worker loads; as pipeline.sketches.sketcher.load_sketcher."""

    folder: Path
    params: SketchParams
    trainable: Trainable
    trust_remote_code: bool


class Arrays(NamedTuple):
    """As pipeline.sketches.collector.Sketched."""

    values: dict[str, np.ndarray]
    audit: np.ndarray
    grad_norm: np.ndarray
    sum_logp: np.ndarray

    def as_sketched(self) -> "Sketched":
        import torch

        from pipeline.sketches.collector import Sketched

        copies = [torch.from_numpy(np.array(array)) for array in self[1:]]  # what Ray hands out can't be written to
        return Sketched({group: torch.from_numpy(np.array(v)) for group, v in self.values.items()}, *copies)


class SketchWorker:
    """The model in the actor's own process, on the one GPU that Ray lets it see, or on its CPUs."""

    def __init__(self, job: SketchJob) -> None:
        from pipeline.sketches.sketcher import load_sketcher

        remote_code = job.trust_remote_code
        self._sketcher = load_sketcher(job.folder, job.params, job.trainable, trust_remote_code=remote_code)
        self._sketcher.__enter__()

    def sketch(self, prompts: Packed, responses: Packed, *, on_progress: Advance) -> Arrays:
        rows = zip(unpack(prompts), unpack(responses), strict=True)
        values, *others = self._sketcher([(prompt.tolist(), response.tolist()) for prompt, response in rows])
        return Arrays({group: v.numpy() for group, v in values.items()}, *(each.numpy() for each in others))


class RemoteRank:
    """A rank of `sketch` on a node; its methods wait. log: where to look."""

    def __init__(self, session: RaySession, place: int, job: SketchJob) -> None:
        """Start its process. Raises EngineFailed where there is no room for it any more."""
        self._session, self._job, self._loaded = session, job, False
        self._actor = session.actor(place)
        self.log = Path("/tmp/ray/session_latest/logs")

    def sketch(self, rows: Sequence[tuple[list[int], list[int]]]) -> "Sketched":
        """As Sketcher, of at least one row. Raises EngineFailed where it dies, what it raised of RequestError and
        RunFailed, and RequestError for a node that has another model or other software."""
        prompts, responses = (pack([np.array(ids, np.int32) for ids in part]) for part in zip(*rows, strict=True))
        try:
            if not self._loaded:
                self._load()
            answer: Any = self._actor.ask("ask", "sketch", prompts, responses, silence=SILENT_SECONDS)
        except BaseException:
            self.kill()
            raise
        return Arrays(*answer).as_sketched()

    def _load(self) -> None:
        facts = self._session.check(self._actor)
        self.log = Path(f"{facts.host}:{self.log}")
        self._actor.ask("start", SketchWorker, self._job, silence=SILENT_SECONDS)
        self._loaded = True

    def close(self) -> None:
        self.kill()

    def kill(self) -> None:
        self._actor.kill()
