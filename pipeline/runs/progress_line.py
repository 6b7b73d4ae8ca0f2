"""The progress line of a training run, fed from history.tsv by the process that started it."""

import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.progress import PLAIN_INTERVAL
from pipeline.training.record import last_row

# history column -> label; those that a run doesn't have are left out.
_SHOWN = {
    "loss": "loss",
    "rewards/margins": "margin",
    "rewards/accuracies": "acc",
    "dcr": "dcr",
    "tokens_per_second": "tok/s",
}


@contextmanager
def training_progress(title: str, steps: int, history: Path) -> Iterator[None]:
    """Show the newest row of `history` while the block runs: a bar on a terminal, otherwise a line now and then."""
    show = _Bar(title, steps) if sys.stderr.isatty() else _Lines(title, steps)
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(0.2):
            show.row(last_row(history))

    # A thread of its own: where torchrun or srun started the ranks, this process trains.
    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        yield
    finally:
        ended.set()
        follower.join()
        show.row(last_row(history))
        show.close()


class _Bar:
    def __init__(self, title: str, steps: int) -> None:
        columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn("left"), TimeRemainingColumn())
        self._progress = Progress(*columns, TextColumn("{task.fields[row]}"), console=Console(stderr=True))
        self._task = self._progress.add_task(title, total=steps, row="starting")
        self._progress.start()

    def row(self, row: Mapping[str, float]) -> None:
        if row:
            self._progress.update(self._task, completed=row["step"], row=_line(row))

    def close(self) -> None:
        self._progress.stop()


class _Lines:
    def __init__(self, title: str, steps: int) -> None:
        self._title, self._steps = title, steps
        self._newest: dict[str, float] = {}
        self._first: tuple[float, float] | None = None  # time and step of the first row seen
        self._said = time.monotonic()

    def row(self, row: Mapping[str, float]) -> None:
        now = time.monotonic()
        if row and self._first is None:
            self._first = (now, row["step"])
        self._newest |= row
        if self._newest and now - self._said >= PLAIN_INTERVAL:
            self._said = now
            self._print(f"  about {self._left(now)} left")

    def close(self) -> None:
        self._print("")

    def _left(self, now: float) -> str:
        assert self._first is not None
        done = self._newest["step"] - self._first[1]
        if not done:
            return "?"
        seconds = round((now - self._first[0]) / done * (self._steps - self._newest["step"]))
        return f"{seconds // 60} min {seconds % 60} s" if seconds >= 60 else f"{seconds} s"

    def _print(self, end: str) -> None:
        step = f"step {self._newest.get('step', 0):.0f} of {self._steps}"
        print(f"{self._title}: {step}  {_line(self._newest)}{end}", file=sys.stderr, flush=True)


def _line(row: Mapping[str, float]) -> str:
    return "  ".join(f"{label} {row[name]:.4g}" for name, label in _SHOWN.items() if name in row)
