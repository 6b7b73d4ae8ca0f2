"""Tables of a run that grow by a row now and then: readable while training, cut back to the resumed step."""

import os
import statistics
from collections.abc import Mapping
from pathlib import Path

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
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(lines[:1] + kept))
        os.replace(temporary, path)

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
