"""One training rank: `python -m pipeline.runs.worker JOB`, started by the stage or by DeepSpeed's launcher.

A stage that was itself started as a rank (torchrun, srun) calls `run_rank` (training/rank.py) directly.
"""

import json
import os
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

from pipeline.errors import RequestError, RunFailed
from pipeline.files import write_json
from pipeline.runs.rank_notes import RankNotes
from pipeline.training.job import ERROR, HEARTBEAT, Job

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
        from pipeline.training.rank import run_rank  # seconds of torch and DeepSpeed, after the watch has begun

        run_rank(job, work)
    except (RequestError, RunFailed) as error:
        kind = "RequestError" if isinstance(error, RequestError) else "RunFailed"
        write_json(work / ERROR, {"kind": kind, "message": str(error)})
        notes.ended(str(error), at_fault=True)
        raise
    except BaseException as error:
        notes.ended(f"{type(error).__name__}: {error}", at_fault=True)
        raise
    notes.ended("finished", at_fault=False)


def _watch(stage_pid: int, stage_host: str, work: Path, notes: RankNotes) -> None:
    """End this rank when it is told to, noting that, and when its stage is gone.

    DVC leaves orphans, and an orphan would train on beside its successor.
    """
    # A handler in Python would run only when the main thread is back from a collective; the pipe speaks at once.
    told, telling = os.pipe()
    os.set_blocking(telling, False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(telling)
    stage_lives = _pid_lives(stage_pid) if stage_host == socket.gethostname() else _heart_beats(work / HEARTBEAT)

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
