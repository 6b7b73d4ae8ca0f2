"""Progress of work in rows and tokens, on stderr: a bar on a terminal, otherwise one plain line now and then."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

PLAIN_INTERVAL = 30.0  # seconds between lines where there is no terminal


class Advance(Protocol):
    def __call__(self, rows: int, tokens: int = 0, /) -> None:
        """`rows` more rows are done, with `tokens` tokens in them; negative where work was lost."""


@contextmanager
def progress_bar(title: str, rows: int, *, tokens: int = 0) -> Iterator[Advance]:
    """Yield the function to call as work completes.

    rows, tokens: the whole of the work. With tokens given, speed and remaining time are reckoned in tokens, because
    rows differ in length. Nothing is shown for no rows.
    """
    if rows and sys.stderr.isatty():
        with _bar(title, rows, tokens) as advance:
            yield advance
    else:
        yield _PlainLines(title, rows, tokens)


@contextmanager
def activity(title: str) -> Iterator[None]:
    """Something without measure that takes seconds (an engine that starts); shown on a terminal only.

    Of several threads the main one alone shows what it does.
    """
    shown = sys.stderr.isatty() and threading.current_thread() is threading.main_thread()
    if not shown or _bars_drawn:  # a second live line would garble the bar
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(title):
        yield


@contextmanager
def _bar(title: str, rows: int, tokens: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn(title),
        BarColumn(),
        TextColumn("{task.fields[counts]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    state = _State(rows, tokens)
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=120) as progress:
        task = progress.add_task(title, total=tokens or rows, counts=state.counts())

        def advance(more_rows: int, more_tokens: int = 0, /) -> None:
            state.add(more_rows, more_tokens)
            progress.update(task, completed=state.done, counts=state.counts())

        _bars_drawn.append(title)
        try:
            yield advance
        finally:
            _bars_drawn.remove(title)


_bars_drawn: list[str] = []


class _State:
    def __init__(self, rows: int, tokens: int) -> None:
        self.rows, self.tokens = rows, tokens
        self.rows_done = self.tokens_done = 0
        self.started = time.monotonic()

    def add(self, rows: int, tokens: int) -> None:
        self.rows_done += rows
        self.tokens_done += tokens

    @property
    def done(self) -> int:
        return self.tokens_done if self.tokens else self.rows_done

    def counts(self) -> str:
        seconds = max(time.monotonic() - self.started, 1e-9)
        unit, rate = "tokens/s" if self.tokens else "rows/s", self.done / seconds
        return f"{self.rows_done:,}/{self.rows:,} rows  {rate:,.{0 if rate >= 10 else 1}f} {unit}"

    def left(self) -> str:
        total = self.tokens or self.rows
        if not self.done:
            return "?"
        seconds = round((time.monotonic() - self.started) * (total - self.done) / self.done)
        return f"{seconds // 60} min {seconds % 60} s" if seconds >= 60 else f"{seconds} s"


class _PlainLines:
    def __init__(self, title: str, rows: int, tokens: int) -> None:
        self.title, self.state = title, _State(rows, tokens)
        self.last_line = time.monotonic()

    def __call__(self, rows: int, tokens: int = 0, /) -> None:
        self.state.add(rows, tokens)
        now = time.monotonic()
        if now - self.last_line >= PLAIN_INTERVAL:
            self.last_line = now
            print(f"{self.title}: {self.state.counts()}, about {self.state.left()} left", file=sys.stderr, flush=True)
