"""Benchmark tasks in one evaluation: run for every model, and written for each cell beside the reference's figures."""

import re
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.harness.results import TaskResults
from pipeline.harness.tasks import Tasks
from pipeline.policies.answers import Answers, Ask
from pipeline.policies.identity import Policy


class TaskFigures:
    """Nothing at all where no tasks are asked for."""

    def __init__(self, tasks: Tasks, base: Policy) -> None:
        """base: the reference, which must be measured first."""
        self._tasks, self._base = tasks, base
        self._found: dict[Policy, TaskResults] = {}

    @property
    def longest(self) -> int:
        """Tokens of the longest context with its answer."""
        return self._tasks.longest

    @property
    def tokenizer(self) -> Path | None:
        """What the engine needs one for: stop strings."""
        return self._base.folder if self._tasks.needs_tokenizer else None

    def measure(self, who: Policy, book: Answers, ask: Ask) -> None:
        """Run all tasks; ask: called where something was not asked before."""
        if self._tasks and who not in self._found:
            self._found[who] = self._tasks.run(book, ask)

    def of(self, policy: Policy) -> dict[str, Any]:
        """{"tasks": {task: {"samples", "metrics", "reference": the reference's metrics}}}, or nothing."""
        if policy not in self._found:
            return {}
        reference = self._found[self._base].figures
        own = self._found[policy].figures
        return {"tasks": {name: figures | {"reference": reference[name]["metrics"]} for name, figures in own.items()}}

    def write_answers(self, policy: Policy, folder: Path) -> None:
        """TASK.parquet in the cell's folder, and in `reference` beside it."""
        for who, place in ((policy, folder), (self._base, folder.parent / "reference")):
            if who in self._found:
                place.mkdir(parents=True, exist_ok=True)
                for name, answers in self._found[who].answers.items():
                    _write(answers, place / f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)}.parquet")


def _write(answers: pl.DataFrame, path: Path) -> None:
    partial = path.with_suffix(".tmp")  # the reference's is written for every cell: never half of it
    answers.write_parquet(partial)
    partial.replace(path)
