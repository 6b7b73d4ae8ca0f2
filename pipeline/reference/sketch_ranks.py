"""Several processes that sketch batches for one stage: ranks. Only the stage writes, so the journal has one writer.

A rank gets a batch as soon as it has sent back the last one, so none waits for another; what is sketched does not
depend on who does it. A rank that dies is replaced, and its batch is asked again as it was. A rank whose stage is gone
finds its pipe closed and ends.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import polars as pl

from cache import SketchIdentity
from pipeline.cluster.session import Need, RaySession
from pipeline.cluster.sketch_worker import RemoteRank, SketchJob
from pipeline.engine.pool import Lost, Pool, Worker
from pipeline.engine.process import orderly_termination
from pipeline.errors import EngineFailed, RequestError, RunFailed
from pipeline.params import SketchParams, Trainable
from pipeline.workspace import log_file

if TYPE_CHECKING:
    from pipeline.sketches.collector import Sketched  # torch, which a stage with nothing to sketch does without

DEATHS_OF_A_BATCH = 3

Sequences = Sequence[tuple[list[int], list[int]]]  # (prompt ids, response ids)
Batch = tuple[pl.DataFrame, Sequences]  # rows with response_key, and their tokens


class RankJob(NamedTuple):
    """What every rank loads; as pipeline.sketches.sketcher.load_sketcher."""

    folder: Path
    params: SketchParams
    trainable: Trainable
    trust_remote_code: bool


class Rank(Worker, Protocol):
    """One that sketches, wherever it runs."""

    def sketch(self, sequences: Sequences) -> "Sketched":
        """The sketches of a batch, in its order."""


def sketch_on_ranks(
    job: RankJob, batches: Iterable[Batch], identity: SketchIdentity
) -> Iterator[tuple[pl.DataFrame, "Sketched"]]:
    """(rows, their sketches) of every batch, in the order in which they are done.

    batches: drawn from as ranks become free, in their threads. identity: whose weights and config the model must have
    on every node. Raises RequestError for more ranks than GPUs and where a cluster has too little, what a rank raised
    of RequestError and RunFailed, and RunFailed where ranks go on dying or, when all others are done, for batches that
    ended three.
    """
    lost = list[Lost[Batch]]()

    def again(found: Lost[Batch]) -> list[Batch]:
        if found.deaths >= DEATHS_OF_A_BATCH:
            lost.append(found)
            return []
        print(f"{found.how} Its log is {found.log}. Its batch is asked again.", file=sys.stderr, flush=True)
        return [found.call]

    with (
        _starter(job, identity) as start,
        Pool[Rank, Batch, "Sketched"](job.params.ranks, start, hopeless=_hopeless, word="rank") as pool,
    ):
        for (rows, _), sketched in pool.answers(batches, lambda rank, batch: rank.sketch(batch[1]), again):
            yield rows, sketched
    if lost:
        keys = [key.hex() for batch in lost for key in batch.call[0]["response_key"]]
        raise RunFailed(
            f"{len(lost)} batches ended {DEATHS_OF_A_BATCH} ranks each, the last like this: {lost[-1].how} They hold "
            f"{len(keys)} responses, the first of them {keys[0]}; the last log is {lost[-1].log}. All others are "
            "journalled: run again, with a smaller sketch.batch_tokens if memory ran out."
        )


@contextmanager
def _starter(job: RankJob, identity: SketchIdentity) -> Iterator[Callable[[int], Rank]]:
    """What makes the rank of a place, on this machine or on a Ray cluster."""
    if job.params.workers == "ray":
        need = Need("sketch", "ranks", job.params.ranks, 1, job.params.ray)
        assert identity.weights is not None and identity.config is not None
        digests = {"weights": identity.weights, "config": identity.config}
        with orderly_termination(), RaySession(need, job.folder, digests) as session:
            yield lambda place: RemoteRank(session, place, SketchJob(*job))
        return
    _require_devices(job.params.ranks)
    numbers = count()

    def start(place: int) -> Rank:
        number = next(numbers)
        return _Rank(job, place, log_file(f"sketch.{number}" if number else "sketch"))

    yield start


def _hopeless(found: str) -> RunFailed:
    return RunFailed(
        f"{found} Their logs are {log_file('sketch').parent}/sketch*.log. What was sketched before is journalled: run "
        "again, with a smaller sketch.batch_tokens if memory ran out."
    )


class _Rank:
    """place: its device, if devices have numbers. log: what it prints."""

    def __init__(self, job: RankJob, place: int, log: Path) -> None:
        context = get_context("spawn")  # CUDA and BLAS threads don't survive a fork
        self.place, self.log = place, log
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work_logged, args=(log, theirs, job, place), daemon=True)
        self.process.start()
        theirs.close()

    def sketch(self, sequences: Sequences) -> "Sketched":
        from pipeline.sketches.collector import Sketched

        try:
            self.pipe.send(sequences)
            kind, content = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            raise EngineFailed(
                f"Rank {self.place} (process {self.process.pid}) ended with code {self.process.exitcode} while it "
                "sketched; a negative code is the signal that killed it."
            ) from None
        if kind is not None:
            raise kind(content)
        import torch

        values, *others = content
        return Sketched({group: torch.from_numpy(v) for group, v in values.items()}, *map(torch.from_numpy, others))

    def close(self) -> None:
        self.pipe.close()
        self.process.terminate()
        self.process.join()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def _work_logged(log: Path, pipe: Any, job: RankJob, number: int) -> None:
    with log.open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    _work(pipe, job, number)


def _work(pipe: Any, job: RankJob, number: int) -> None:
    import torch

    from pipeline.sketches.sketcher import load_sketcher

    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // job.params.ranks))
    with suppress(EOFError, BrokenPipeError, KeyboardInterrupt):  # the stage is gone
        try:
            remote_code = job.trust_remote_code
            sketcher = load_sketcher(job.folder, job.params, job.trainable, trust_remote_code=remote_code, rank=number)
            with sketcher:
                while True:
                    values, *others = sketcher(pipe.recv())
                    # As arrays: torch would send handles of shared memory, which a killed rank leaves behind.
                    arrays = {group: v.numpy() for group, v in values.items()}, *(each.numpy() for each in others)
                    pipe.send((None, arrays))
        except (RequestError, RunFailed) as error:
            pipe.send((type(error), str(error)))


def _require_devices(ranks: int) -> None:
    import torch

    if torch.cuda.is_available() and ranks > torch.cuda.device_count():
        raise RequestError(f"sketch.ranks is {ranks}, but only {torch.cuda.device_count()} GPUs are visible.")
