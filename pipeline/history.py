"""history.tsv: one row per optimizer step, readable while training, cut back to the resumed step."""

import os
import statistics
from collections.abc import Mapping
from pathlib import Path


class History:
    def __init__(self, path: Path, *, keep_steps: int) -> None:
        """Open for appending after step `keep_steps`; later rows, of a run that died, are dropped."""
        self.path = path
        lines = path.read_text().splitlines(keepends=True) if path.exists() and keep_steps else []
        kept = [line for line in lines[1:] if line.endswith("\n") and int(line.partition("\t")[0]) <= keep_steps]
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(lines[:1] + kept))
        os.replace(temporary, path)

    def append(self, row: Mapping[str, float]) -> None:
        with self.path.open("a") as file:
            if file.tell() == 0:
                file.write("\t".join(row) + "\n")
            file.write("\t".join(f"{value:.9g}" for value in row.values()) + "\n")


def median(path: Path, column: str) -> float:
    """Median of a column over all steps; NaN without any."""
    names, *rows = [line.rstrip("\n").split("\t") for line in path.read_text().splitlines()]
    values = [float(row[names.index(column)]) for row in rows]
    return statistics.median(values) if values else float("nan")


def last_row(path: Path) -> dict[str, float]:
    """The last complete row by column name; empty if there is none."""
    lines = (
        [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []
    )
    if len(lines) < 2:
        return {}
    return dict(zip(lines[0].split(), map(float, lines[-1].split()), strict=True))
