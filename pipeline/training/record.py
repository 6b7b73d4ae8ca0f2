"""What a training run tells while it trains: tables that grow by a row, and the trackers that were asked for.

Rank 0 writes; anybody may read meanwhile. A resumed run cuts its tables back to the step it goes on from.
"""

import os
import resource
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.files import write_text
from pipeline.training.trackers import Tracker

HISTORY, EVALUATIONS = "history.tsv", "evaluations.tsv"
STATUS = Path("/proc/self/status")


class RunRecord:
    def __init__(self, work: Path, start: int, *, saved: Path, trackers: Sequence[Tracker] = ()) -> None:
        """saved: the folder of the checkpoint of step `start`, with the tables as they were then."""
        self._history, self._evaluations = (
            History(work / name, keep_steps=start, saved=saved / name) for name in (HISTORY, EVALUATIONS)
        )
        self._trackers = trackers

    def trained(self, row: Mapping[str, float]) -> None:
        self._history.append(row)
        for tracker in self._trackers:
            tracker.log("train", row)

    def evaluated(self, row: Mapping[str, float]) -> None:
        self._evaluations.append(row)
        for tracker in self._trackers:
            tracker.log("held-out", row)

    def files(self) -> list[Path]:
        """What a checkpoint takes along."""
        return [self._history.path, self._evaluations.path]

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


_TAIL = 1 << 16  # bytes that surely hold the last row


class History:
    def __init__(self, path: Path, *, keep_steps: int, saved: Path | None = None) -> None:
        """Open for appending after step `keep_steps`; later rows, of a run that died, are dropped.

        saved: the table as the checkpoint of that step holds it, to be taken instead of `path`.
        """
        self.path = path
        source = saved if saved is not None and keep_steps else path
        lines = source.read_text().splitlines(keepends=True) if source.exists() and keep_steps else []
        kept = [line for line in lines[1:] if line.endswith("\n") and int(line.partition("\t")[0]) <= keep_steps]
        write_text(path, "".join(lines[:1] + kept))

    def append(self, row: Mapping[str, float]) -> None:
        """Add a row in one write, so that whoever reads meanwhile finds whole lines."""
        with self.path.open("a") as file:
            heading = "\t".join(row) + "\n" if file.tell() == 0 else ""
            file.write(heading + "\t".join(f"{value:.9g}" for value in row.values()) + "\n")


def median(path: Path, column: str) -> float:
    """Median of a column over all steps; NaN without any."""
    names, *rows = [line.rstrip("\n").split("\t") for line in path.read_text().splitlines()]
    values = [float(row[names.index(column)]) for row in rows]
    return statistics.median(values) if values else float("nan")


def last_row(path: Path) -> dict[str, float]:
    """The last complete row by column name; empty if there is none. Reads the end of the file only."""
    if not path.exists():
        return {}
    with path.open("rb") as file:
        heading = file.readline()
        file.seek(max(len(heading), file.seek(0, os.SEEK_END) - _TAIL))
        lines = [line for line in file.read().splitlines(keepends=True) if line.endswith(b"\n")]
    if not lines:
        return {}
    return dict(zip(heading.decode().split(), map(float, lines[-1].split()), strict=True))


def peak_bytes() -> int:
    """The largest resident set of this process so far, in host memory.

    Not getrusage's ru_maxrss: Linux keeps that across exec, so a process that starts small would report what the one
    that started it held.
    """
    for line in STATUS.read_text().splitlines() if STATUS.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
