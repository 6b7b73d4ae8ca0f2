"""One training rank: `python -m pipeline.runs.worker JOB`, started by the stage or by DeepSpeed's launcher.

A stage that was itself started as a rank (torchrun, srun) calls `run_rank` instead.
"""

import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from pipeline.errors import RequestError, RunFailed
from pipeline.runs.launch import Job
from pipeline.runs.rank_notes import RankNotes

TASKS = {"sft": "pipeline.training.sft_task", "preferences": "pipeline.training.preference_task"}
HEARTBEAT_SECONDS = 60  # a stage on another host that gave no sign for so long is gone


def main() -> None:
    # DeepSpeed's launcher adds --local_rank=N; the rank is in the environment.
    job_file = Path(next(argument for argument in sys.argv[1:] if not argument.startswith("--")))
    raw = json.loads(job_file.read_text())
    job = Job(**{field.name: raw[field.name] for field in fields(Job)})
    work = job_file.parent
    notes = RankNotes(work / "ranks", int(os.environ["RANK"]))
    _watch(raw["stage_pid"], raw["host"], work, notes)
    try:
        run_rank(job, work)
    except (RequestError, RunFailed) as error:
        _report(work / "error.json", error)
        notes.ended(str(error), at_fault=True)
        raise
    except BaseException as error:
        notes.ended(f"{type(error).__name__}: {error}", at_fault=True)
        raise
    notes.ended("finished", at_fault=False)


def run_rank(job: Job, work: Path) -> dict[str, Any] | None:
    """Train as the rank that the environment says, and save the model; returns rank 0's summary."""
    from pipeline.model.folders import save_model
    from pipeline.params import LoopParams
    from pipeline.training.batches import steps_for, tokens_in
    from pipeline.training.deepspeed_engine import init_distributed, leave_distributed
    from pipeline.training.history import median
    from pipeline.training.loop import ordered_groups, run_loop
    from pipeline.training.trackers import open_trackers

    init_distributed()
    loop = LoopParams.model_validate(job.loop)
    task_module = importlib.import_module(TASKS[job.kind])
    started = time.perf_counter()
    engine, task, model = task_module.start(job, loop)
    companion = task_module.companion(task)
    resumed_from = run_loop(
        engine,
        task,
        loop,
        seed=job.seed,
        work=work,
        held_out=task_module.held_out(job, loop, task),
        companion=companion,
        trackers=lambda start: open_trackers(
            job.log_to, title=job.title, run_id=work.name, config=job.loop | job.settings, start=start
        ),
    )
    is_adapter = hasattr(model, "peft_config")
    state = engine.gathered_state(model, trained_only=is_adapter)
    beside = {"offsets": companion.summary()} if companion else {}
    summary = None
    if engine.rank == 0:
        save_model(model, state, Path(job.paths["tokenizer"]), work / "model")
        if companion:
            companion.export(work / "model")
        steps = steps_for(loop.epochs, len(task.lengths), loop.batch_size)
        summary = {
            "steps": steps,
            "tokens": tokens_in(
                steps,
                task.lengths,
                seed=job.seed,
                batch_size=loop.batch_size,
                groups=ordered_groups(task.groups, loop),
            ),
            "tokens_per_second": median(work / "history.tsv", "tokens_per_second"),
            "seconds": time.perf_counter() - started,
            "resumed_from_step": resumed_from,
            "layout": task.layout,
            **task.kernels,
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,  # of rank 0, in host memory
            **beside,
        }
        (work / "summary.json").write_text(json.dumps(summary))
    leave_distributed()
    return summary


def _report(file: Path, error: Exception) -> None:
    kind = "RequestError" if isinstance(error, RequestError) else "RunFailed"
    unfinished = file.with_suffix(f".{os.getpid()}")  # several ranks may fail alike at once
    unfinished.write_text(json.dumps({"kind": kind, "message": str(error)}))
    unfinished.replace(file)


def _watch(stage_pid: int, stage_host: str, work: Path, notes: RankNotes) -> None:
    """End this rank when it is told to, noting that, and when its stage is gone.

    DVC leaves orphans, and an orphan would train on beside its successor.
    """
    # A handler in Python would run only when the main thread is back from a collective; the pipe speaks at once.
    told, telling = os.pipe()
    os.set_blocking(telling, False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(telling)
    stage_lives = _pid_lives(stage_pid) if stage_host == socket.gethostname() else _heart_beats(work / "heartbeat")

    def watch() -> None:
        while stage_lives() and not select.select([told], [], [], 1.0)[0]:
            pass
        notes.ended("told to stop", at_fault=False)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _pid_lives(pid: int) -> Callable[[], bool]:
    def lives() -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return True

    return lives


def _heart_beats(file: Path) -> Callable[[], bool]:
    """Whether the content of a file on a shared file system still changes; clocks of two hosts may differ."""
    seen, when = "", time.monotonic()

    def beats() -> bool:
        nonlocal seen, when
        found = seen
        with suppress(OSError):  # being replaced
            found = file.read_text()
        if found != seen:
            seen, when = found, time.monotonic()
        return time.monotonic() - when < HEARTBEAT_SECONDS

    return beats


if __name__ == "__main__":
    main()
