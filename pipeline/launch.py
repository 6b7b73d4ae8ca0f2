"""Start the training ranks under DeepSpeed's launcher, watch them, and publish what they made.

The stage itself holds no model: it writes a job file, starts the launcher, follows history.tsv, and moves the results
to their outputs only when every rank has ended well. DVC deletes a stage's outputs before it runs, so whatever must
survive a kill lives in a work folder outside them, named by a digest of everything that determines the run.
"""

import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.batches import steps_for
from pipeline.errors import RequestError, RunFailed
from pipeline.history import last_row
from pipeline.params import LoopParams
from pipeline.training_progress import training_progress
from pipeline.workspace import workspace

# Settings that may change between a run and its continuation.
_NOT_IN_DIGEST = {
    "checkpoint_every",
    "keep_checkpoints",
    "logps_chunk_tokens",
    "activation_checkpointing",
    "drift_tolerance",
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the ranks do, as the job file carries it. `loop` is a LoopParams dump; `settings` is the task's own."""

    kind: str  # "sft" or "preferences"
    paths: dict[str, str]
    loop: dict[str, Any]
    settings: dict[str, Any]
    seed: int


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def work_folder(job: Job, *content: str) -> Path:
    """The folder that a run and its resumption share. content: digests of all inputs."""
    loop, settings = (
        {key: value for key, value in part.items() if key not in _NOT_IN_DIGEST} for part in (job.loop, job.settings)
    )
    identity = json.dumps([job.kind, loop, settings, job.seed, *content], sort_keys=True)
    digest = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
    return workspace() / "training" / f"{job.kind}-{digest}"


def launch(job: Job, work: Path, *, loop: LoopParams, n_examples: int, title: str) -> dict[str, Any]:
    """Run the job on loop.ranks processes; returns the summary that rank 0 wrote.

    Raises RequestError or RunFailed as a rank raised it, RunFailed with the log's last lines if one died, RunFailed
    before anything is touched if the same run is under way elsewhere.
    """
    with _sole_run(work):
        return _run_ranks(job, work, loop=loop, n_examples=n_examples, title=title)


def _run_ranks(job: Job, work: Path, *, loop: LoopParams, n_examples: int, title: str) -> dict[str, Any]:
    for leftover in ("error.json", "summary.json"):
        (work / leftover).unlink(missing_ok=True)
    (work / "job.json").write_text(json.dumps(asdict(job) | {"stage_pid": os.getpid()}, indent=1))
    log = work / "ranks.log"
    steps = steps_for(loop.epochs, n_examples, loop.batch_size)
    with log.open("ab") as output, training_progress(title, steps) as progress:
        ranks = subprocess.Popen(
            _launcher_command(loop.ranks, work / "job.json"),
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_rank_environment(loop.ranks),
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        try:
            while ranks.poll() is None:
                progress(last_row(work / "history.tsv"))
                time.sleep(0.2)
            progress(last_row(work / "history.tsv"))
        except BaseException:
            _stop(ranks)
            raise
    return _outcome(work, ranks.returncode, log)


def publish(work: Path, *, out: Path, history: Path, metrics: Path, summary: dict[str, Any]) -> None:
    """Move the finished model and its history to the stage's outputs, then drop the checkpoints."""
    for path in (out, history, metrics):
        path.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():
        shutil.rmtree(out)
    shutil.move(work / "model", out)
    shutil.copyfile(work / "history.tsv", history)
    unfinished = metrics.with_suffix(".json.partial")
    unfinished.write_text(json.dumps(summary, indent=1) + "\n")
    os.replace(unfinished, metrics)  # last: it means that model and history are there
    shutil.rmtree(work)


@contextmanager
def _sole_run(work: Path) -> Iterator[None]:
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


def _outcome(work: Path, returncode: int, log: Path) -> dict[str, Any]:
    error = work / "error.json"
    if error.exists():
        found = json.loads(error.read_text())
        raise {"RequestError": RequestError, "RunFailed": RunFailed}[found["kind"]](found["message"])
    summary = work / "summary.json"
    if returncode != 0 or not summary.exists():
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise RunFailed(
            f"a training process ended with exit code {returncode}; its log {log} ends with:\n{tail}\n"
            "Checkpoints are kept: run the same command again to go on from the newest one."
        )
    return json.loads(summary.read_text())


def _launcher_command(ranks: int, job: Path) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks), "--master_port", str(port)]
    return [sys.executable, *launcher, "--module", "pipeline.worker", str(job)]


def _rank_environment(ranks: int) -> dict[str, str]:
    environment = dict(os.environ)
    # Without these glibc returns every freed activation to the kernel; 4-10 % of a step on CPU.
    environment.setdefault("MALLOC_MMAP_MAX_", "0")
    environment.setdefault("MALLOC_TRIM_THRESHOLD_", str(16 << 30))
    # Threads that spin while they wait cost nothing alone and up to 50x on a machine that does anything else.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    return environment


def _die_with_parent() -> None:
    """In the child before exec: SIGTERM when the stage dies, however it dies (Linux)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _stop(ranks: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(ranks.pid, number)
            ranks.wait(timeout=10)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
