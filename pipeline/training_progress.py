"""The progress line of a training run, fed from history.tsv by the stage that started the ranks."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Show = Callable[[Mapping[str, float]], None]

# history column -> label; those that a run doesn't have are left out.
_SHOWN = {
    "loss": "loss",
    "rewards/margins": "margin",
    "rewards/accuracies": "acc",
    "dcr": "dcr",
    "tokens_per_second": "tok/s",
}


@contextmanager
def training_progress(title: str, steps: int) -> Iterator[Show]:
    """Yield a function to call with the newest history row; a bar on a terminal, one closing line otherwise."""
    newest: dict[str, float] = {}
    bar = Progress(
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[row]}"),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )
    with bar:
        task = bar.add_task(title, total=steps, row="starting")

        def show(row: Mapping[str, float]) -> None:
            if row:
                newest.update(row)
                bar.update(task, completed=row["step"], row=_line(row))

        yield show
    if not sys.stderr.isatty():
        print(f"{title}: step {newest.get('step', 0):.0f} of {steps}  {_line(newest)}", file=sys.stderr)


def _line(row: Mapping[str, float]) -> str:
    return "  ".join(f"{label} {row[name]:.4g}" for name, label in _SHOWN.items() if name in row)
