"""The folder of one training run, which its resumption shares: named by all that determines the run, used by one.

DVC deletes a stage's outputs before it runs, so whatever must survive a kill lives here, outside them.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import RunFailed
from pipeline.training.checkpoints import complete_checkpoints
from pipeline.training.job import Job
from pipeline.workspace import workspace

# Settings that may change between a run and its continuation.
_NOT_IN_DIGEST = {
    "checkpoint_every",
    "keep_checkpoints",
    "logps_chunk_tokens",
    "activation_checkpointing",
    "drift_tolerance",
}

# How checkpoints are divided into files; see _division.
_DIVIDING = ("ranks", "zero_stage", "optimizer_offload")


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def work_folder(job: Job, *content: str) -> Path:
    """The folder that a run and its resumption share. content: digests of all inputs."""
    left_out = _NOT_IN_DIGEST.union(_DIVIDING)
    loop, settings = (
        {key: value for key, value in part.items() if key not in left_out} for part in (job.loop, job.settings)
    )
    identity = json.dumps([job.kind, loop, settings, job.seed, *content], sort_keys=True)
    digest = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
    return workspace() / "training" / f"{job.kind}-{digest}-{_division(job.loop)}"


def _division(loop: dict[str, Any]) -> str:
    """Which checkpoints a run can go on from. Without ZeRO every rank holds all, so their number doesn't matter."""
    if loop["zero_stage"] == 0 and loop["dtype"] == "float32":
        return "zero0"
    return f"zero{loop['zero_stage']}-ranks{loop['ranks']}" + ("-offload" if loop["optimizer_offload"] else "")


def division_of(work: Path) -> str:
    return work.name[work.name.rindex("zero") :]


def other_divisions(work: Path) -> list[Path]:
    found = sorted(work.parent.glob(work.name.removesuffix(division_of(work)) + "zero*"))
    return [folder for folder in found if folder != work and complete_checkpoints(folder / "checkpoints")]


@contextmanager
def sole_run(work: Path) -> Iterator[None]:
    """Hold the folder's lock; the kernel drops it with this process. Ranks follow their stage within a second."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise RunFailed(
                f"{work} is in use by another run of the same training (process {lock.read()}). "
                "Wait for it or stop it, then run again."
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield
