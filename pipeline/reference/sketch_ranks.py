"""Several processes that sketch batches for one stage: ranks. Only the stage writes, so the journal has one writer.

A rank gets a batch as soon as it has sent back the last one, so none waits for another; what is sketched does not
depend on who does it. A rank whose stage is gone finds its pipe closed and ends.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import connection, get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from pipeline.errors import RequestError, RunFailed
from pipeline.params import SketchParams, Trainable

if TYPE_CHECKING:
    from pipeline.sketches.collector import Sketched  # torch, which a stage with nothing to sketch does without

T = TypeVar("T")
Sequences = Sequence[tuple[list[int], list[int]]]  # (prompt ids, response ids)


class RankJob(NamedTuple):
    """What every rank loads; as pipeline.sketches.sketcher.load_sketcher."""

    folder: Path
    params: SketchParams
    trainable: Trainable
    trust_remote_code: bool


def sketch_on_ranks(job: RankJob, batches: Iterable[tuple[T, Sequences]]) -> Iterator[tuple[T, "Sketched"]]:
    """(tag, sketches) of every (tag, sequences) of `batches`, in the order in which they are done.

    Raises RequestError for more ranks than GPUs, RunFailed for a rank that died, and what a rank raised of these kinds.
    """
    _require_devices(job.params.ranks)
    ranks = [_Rank(job, number) for number in range(job.params.ranks)]
    try:
        waiting, busy = iter(batches), dict[connection.Connection, tuple[_Rank, T]]()
        for rank in ranks:
            _give(rank, waiting, busy)
        while busy:
            for pipe in connection.wait(list(busy)):
                assert isinstance(pipe, connection.Connection)
                rank, tag = busy.pop(pipe)
                sketched = rank.answer()
                _give(rank, waiting, busy)  # it works on while the stage journals
                yield tag, sketched
    finally:
        for rank in ranks:
            rank.stop()


def _give(
    rank: "_Rank",
    waiting: Iterator[tuple[T, Sequences]],
    busy: dict[connection.Connection, tuple["_Rank", T]],
) -> None:
    for tag, sequences in waiting:
        rank.ask(sequences)
        busy[rank.pipe] = rank, tag
        return


class _Rank:
    def __init__(self, job: RankJob, number: int) -> None:
        context = get_context("spawn")  # CUDA and BLAS threads don't survive a fork
        self.number = number
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, job, number), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, sequences: Sequences) -> None:
        with suppress(BrokenPipeError):  # that it died shows where its answer is awaited
            self.pipe.send(sequences)

    def answer(self) -> "Sketched":
        from pipeline.sketches.collector import Sketched

        try:
            kind, content = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            raise RunFailed(
                f"Rank {self.number} (process {self.process.pid}) ended with code {self.process.exitcode} while it "
                "sketched; a negative code is the signal that killed it. What was sketched before is journalled: run "
                "again, with a smaller sketch.batch_tokens if memory ran out."
            ) from None
        if kind is not None:
            raise kind(content)
        import torch

        values, *others = content
        return Sketched({group: torch.from_numpy(v) for group, v in values.items()}, *map(torch.from_numpy, others))

    def stop(self) -> None:
        self.pipe.close()
        self.process.terminate()
        self.process.join()


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
