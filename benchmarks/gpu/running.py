"""Runs the parts of the suite, each in a process of its own under a time limit, and keeps every result at once.

OUT/results.jsonl has a line for each result and for each part's end, on disk as soon as it is there; OUT/suite.log all
else that parts print. Nothing but the standard library, so that nothing a part does can end this process (the dry run
alone forks, forking.py).
"""

import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any, NamedTuple, Protocol

Record = dict[str, Any]
DONE, FAILED, TIMED_OUT, SKIPPED, CUT_OFF, NO_TIME = "done", "failed", "timed out", "skipped", "cut off", "no time left"
BAD = {FAILED, TIMED_OUT, CUT_OFF, NO_TIME}
LEAST = 10.0  # seconds; with less a part isn't started
RESERVED = 0.6  # of what is left at most: where time is short, the most valuable parts run
GRACE = 5.0  # seconds between SIGTERM and SIGKILL
SHOWN = 1500  # characters of an error


class Part(NamedTuple):
    """command: arguments of Python. limit: seconds at most. reserve: seconds that earlier parts leave for this one."""

    name: str
    command: list[str]
    limit: float
    reserve: float
    environment: dict[str, str] = {}  # noqa: RUF012  # never changed


class Process(Protocol):
    """Of subprocess.Popen what is used here."""

    pid: int
    stdout: IO[bytes] | None

    def wait(self, timeout: float) -> int: ...


class CutOff(Exception):
    """Somebody wants this process to end."""


class Suite:
    """A run of parts. records: what stands in results.jsonl."""

    def __init__(
        self,
        out: Path,
        *,
        seconds: float,
        environment: dict[str, str],
        start: Callable[[Sequence[str], dict[str, str], Any], Process] | None = None,
    ) -> None:
        """seconds: for all parts. environment: of theirs, beside this process's. start: instead of a new Python, with
        its arguments, environment and log."""
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.environment = out, environment
        self.records: list[Record] = []
        self._start = start or _start
        self._started = time.monotonic()
        self._deadline = self._started + seconds
        self._results = (out / "results.jsonl").open("w")
        self._log = (out / "suite.log").open("wb", buffering=0)

    def record(self, part: str, content: Record) -> None:
        assert "part" not in content
        record = {"part": part} | content | {"at": round(time.monotonic() - self._started, 1)}
        self.records.append(record)
        line = json.dumps(record)
        self._results.write(line + "\n")
        self._results.flush()
        os.fsync(self._results.fileno())
        with suppress(OSError):  # whoever read our output may be gone
            print(line, flush=True)

    def run(self, parts: Sequence[Part], summarise: Callable[[list[Record]], None]) -> int:
        """The exit status: 0 where no part went wrong, 1, or 143 when this process was told to end.

        summarise: gets the records after every part.
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, _cut_off)
        try:
            for number, part in enumerate(parts):
                left = self._deadline - time.monotonic()
                later = sum(other.reserve for other in parts[number + 1 :])
                self._run(part, min(part.limit, left - min(later, RESERVED * left)))
                summarise(self.records)
        except CutOff:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            summarise(self.records)
            return 128 + signal.SIGTERM
        return int(any(record.get("status") in BAD for record in self.records))

    def _run(self, part: Part, limit: float) -> None:
        began, status, error = time.monotonic(), CUT_OFF, ""
        if limit < LEAST:
            self.record(part.name, {"case": "ended", "status": NO_TIME, "seconds": 0.0, "error": ""})
            return
        place = self._log.tell()
        self._log.write(f"\n==== {part.name}, at most {limit:.0f} s\n".encode())
        limits = {"GPU_SUITE_SECONDS": f"{limit:.0f}"}
        process = self._start(part.command, self.environment | part.environment | limits, self._log)
        try:
            status = self._follow(part, process, began + limit)
        finally:
            _end(process)
            if status in BAD:
                error = self._said_since(place)
            seconds = round(time.monotonic() - began, 1)
            self.record(part.name, {"case": "ended", "status": status, "seconds": seconds, "error": error})

    def _follow(self, part: Part, process: Process, deadline: float) -> str:
        """Keep what it prints until it ends or time is up; returns how that was."""
        lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=_read, args=(process, lines), daemon=True).start()
        results = skips = 0
        try:
            while line := lines.get(timeout=max(0.0, deadline - time.monotonic())):
                result = _result(line)
                if result is None:
                    self._log.write(line)
                    continue
                self.record(part.name, result)
                skips += result["case"] == "skipped"
                results += 1
            code = process.wait(timeout=max(1.0, deadline - time.monotonic()))
        except (queue.Empty, subprocess.TimeoutExpired):
            return TIMED_OUT
        if code:
            self._log.write(f"[exit status {code}]\n".encode())
            return FAILED
        return SKIPPED if results and skips == results else DONE

    def _said_since(self, place: int) -> str:
        text = (self.out / "suite.log").read_bytes()[place:]
        return text[-SHOWN:].decode(errors="replace").strip()


def _start(command: Sequence[str], environment: dict[str, str], log: Any) -> Process:
    return subprocess.Popen(
        [sys.executable, *command],
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        process_group=0,  # to end it with all its own; not a session, which could outlive what started this one
        preexec_fn=_die_with_parent,
    )


def _read(process: Process, lines: "queue.SimpleQueue[bytes]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(b"")


def _result(line: bytes) -> Record | None:
    """What `emit` printed; None for all else that libraries print."""
    if not line.startswith(b'{"case": '):
        return None
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _end(process: Process) -> None:
    """It and what it started. A process that the kernel doesn't let go is left behind."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE)


def _die_with_parent() -> None:
    """In the child before exec: SIGKILL when the suite dies, however it dies (Linux)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _cut_off(_number: int, _frame: FrameType | None) -> None:
    raise CutOff
