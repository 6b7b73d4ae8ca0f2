"""Run a training job on its ranks and publish what they made.

The stage itself holds no model: it writes a job file, starts the ranks (processes.py), follows history.tsv, and moves
the results to their outputs only when every rank has ended well. Where torchrun or srun started this process as
a rank, it trains itself, and rank 0 does the stage's part too.
"""

import json
import os
import shutil
import signal
import socket
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.errors import RequestError, RunFailed
from pipeline.files import write_json
from pipeline.params import LoopParams
from pipeline.runs.processes import hostfile, running_ranks
from pipeline.runs.progress_line import training_progress
from pipeline.runs.rank_notes import culprits
from pipeline.runs.started import StartedRank, require_ranks, started_rank
from pipeline.runs.work_folder import division_of, other_divisions, sole_run
from pipeline.training.batches import steps_for
from pipeline.training.checkpoints import complete_checkpoints, drop_unsound
from pipeline.training.job import ERROR, HEARTBEAT, JOB, SUMMARY, Job
from pipeline.training.record import EVALUATIONS, HISTORY, last_row


def require_steps(loop: LoopParams, n_examples: int, section: str) -> None:
    """RequestError for settings that ask for less than one batch. section: `sft` or `train`, for the message."""
    if loop.epochs * n_examples < loop.batch_size:
        raise RequestError(
            f"{section}.epochs {loop.epochs:g} of {n_examples} examples are fewer than one batch "
            f"({section}.batch_size {loop.batch_size}), so there is no step to make. "
            f"Lower {section}.batch_size, or set {section}.epochs to at least {loop.batch_size / n_examples:.3g}."
        )


def launch(job: Job, work: Path, *, loop: LoopParams, n_examples: int) -> dict[str, Any] | None:
    """Run the job on loop.ranks processes; returns rank 0's summary, None where this process is another rank.

    Raises RequestError or RunFailed as a rank raised it, RunFailed naming the rank that died, RunFailed before
    anything is touched if the same run is under way elsewhere.
    """
    steps = steps_for(loop.epochs, n_examples, loop.batch_size)
    started = started_rank()
    if started is None:
        hostfile(loop.ranks)
        with sole_run(work):
            _prepare(job, work)
            return _run_ranks(job, work, loop=loop, steps=steps)
    require_ranks(started, loop.ranks)
    return _take_part(job, work, started, steps=steps)


def _take_part(job: Job, work: Path, started: StartedRank, *, steps: int) -> dict[str, Any] | None:
    from pipeline.training.rank import run_rank  # torch and DeepSpeed, which a stage does without

    if started.rank:
        return run_rank(job, work)  # meets rank 0 only when that has prepared the folder
    with sole_run(work):
        _prepare(job, work)
        with training_progress(job.title, steps, work / HISTORY):
            return run_rank(job, work)


def _prepare(job: Job, work: Path) -> None:
    """A folder that ranks can go on from; what was found on the way goes to stderr."""
    for leftover in (ERROR, SUMMARY):
        (work / leftover).unlink(missing_ok=True)
    shutil.rmtree(work / "ranks", ignore_errors=True)
    for message in drop_unsound(work / "checkpoints"):
        print(f"{job.title}: {message}", file=sys.stderr)
    if not complete_checkpoints(work / "checkpoints"):
        for other in other_divisions(work):
            print(
                f"{job.title}: the same training has checkpoints up to step "
                f"{complete_checkpoints(other / 'checkpoints')[-1]} in {other}, of another number of ranks or ZeRO "
                f"stage ({division_of(other)}; this run: {division_of(work)}). Checkpoints are divided by these, so "
                "this run begins anew. Set them back to go on with the other one, or remove its folder.",
                file=sys.stderr,
            )
    write_json(work / JOB, asdict(job) | {"stage_pid": os.getpid(), "host": socket.gethostname()})


def _run_ranks(job: Job, work: Path, *, loop: LoopParams, steps: int) -> dict[str, Any]:
    log = work / "ranks.log"
    with (
        training_progress(job.title, steps, work / HISTORY),
        running_ranks(work / JOB, loop.ranks, log) as ranks,
    ):
        beats = 0
        while ranks.poll() is None:
            if beats % 25 == 0:  # ranks on other hosts can't look whether this process lives
                (work / HEARTBEAT).write_text(str(beats))
            beats += 1
            time.sleep(0.2)
    return _outcome(work, ranks.returncode, log)


def publish(
    work: Path, *, out: Path, history: Path, metrics: Path, summary: dict[str, Any], evaluations: Path | None = None
) -> None:
    """Move the finished model and its tables to the stage's outputs, then drop the checkpoints.

    evaluations: where measurements of held-out pairs go; a heading alone if none were asked for.
    """
    for path in (out, history, metrics):
        path.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():
        shutil.rmtree(out)
    shutil.move(work / "model", out)
    shutil.copyfile(work / HISTORY, history)
    if evaluations is not None:
        evaluations.write_text((work / EVALUATIONS).read_text() or "step\n")
    write_json(metrics, summary)  # last: it means that model and history are there
    shutil.rmtree(work)


def _outcome(work: Path, returncode: int, log: Path) -> dict[str, Any]:
    error = work / ERROR
    if error.exists():
        found = json.loads(error.read_text())
        raise {"RequestError": RequestError, "RunFailed": RunFailed}[found["kind"]](found["message"])
    summary = work / SUMMARY
    if returncode == 0 and summary.exists():
        content: dict[str, Any] = json.loads(summary.read_text())
        return content
    steps = complete_checkpoints(work / "checkpoints")
    newest = f"the checkpoint of step {steps[-1]}" if steps else "the beginning, since there is no checkpoint yet"
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise RunFailed(
        f"{culprits(work / 'ranks') or 'the ranks did not begin, or what started them died'}, after step "
        f"{last_row(work / HISTORY).get('step', 0):.0f}, and training ended ({_ending(returncode)}). "
        f"Run the same command again to go on from {newest}. The log {log} ends with:\n{tail}"
    )


def _ending(returncode: int) -> str:
    number = -returncode if returncode < 0 else 256 - returncode  # DeepSpeed's launcher passes -9 on as 247
    if number in set(signal.Signals):
        return f"signal {signal.Signals(number).name}"
    return f"exit code {returncode}"
