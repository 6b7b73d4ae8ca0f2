"""Engines die, hang and fail. Scoring goes on with others, and a row that ends every engine is set aside.

Nobody can tell which row of a call ended an engine, or whether any did. So the call is asked again, after everything
else: first as it was, since then its numbers are the same to the last bit, whatever ended the first engine; if it ends
another one, row by row. A row at fault has then ended three engines, the last one alone, and its neighbours have been
answered.
"""

import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import NamedTuple, Protocol, Self

import polars as pl

from pipeline.engine.environment import engine_places
from pipeline.engine.pool import Lost, Pool, Worker
from pipeline.engine.probe import Probe, make_probe
from pipeline.engine.process import EngineProcess, Scored
from pipeline.engine.rows import SKETCHED, EngineLength, Row, calls, engine_length, engine_rows
from pipeline.errors import EngineFailed, RunFailed
from pipeline.model.limits import ModelLimits
from pipeline.params import ScoreParams
from pipeline.progress import Advance, activity
from pipeline.sketches.head_plan import HeadPlan
from pipeline.workspace import log_file

DEATHS_OF_A_ROW = 3


class Engine(Worker, Protocol):
    """What scoring asks of an engine, wherever it runs: as EngineProcess, which says more of each."""

    def load(
        self,
        model: Path,
        length: EngineLength,
        *,
        probe: Probe | None,
        trust_remote_code: bool,
        plan: HeadPlan | None,
        backend: str | None,
    ) -> str:
        """Be ready to score, by a backend that answers the probe rightly; returns its name."""

    def score(self, rows: Sequence[Row], advance: Advance, *, sketched: Sequence[bool] | None = None) -> Scored:
        """Log-probs of each response's tokens, in the order of rows."""


@dataclass(frozen=True)
class Engines:
    """Where engines come from. count: at a time. start: makes one for a place, 0 to count - 1, with the file for what
    it prints; called again, from another thread, where one has died."""

    count: int
    start: Callable[[int, Path], Engine]


def local_engines(params: ScoreParams, rows: int) -> Engines:
    """As many processes on this machine as score.engines says, and no more than `rows` rows make calls.

    Raises RequestError where there are too few GPUs.
    """
    count = max(1, min(params.engines, math.ceil(rows / params.rows_per_call)))
    places = engine_places(params, count)
    return Engines(count, lambda place, log: EngineProcess(params, log=log, place=places[place]))


class ScoredCall(NamedTuple):
    """rows: columns of rows.ROW_COLUMNS; inputs, answer.logps and any answer.sketches are in their order."""

    rows: pl.DataFrame
    inputs: list[Row]
    answer: Scored


class Quarantined(NamedTuple):
    """A row that ended three engines. how: the end of the last; log: that engine's."""

    key: bytes
    how: str
    log: Path


class SupervisedEngines:
    """Engines for scoring that are replaced when they die; a context manager.

    quarantined: rows that were given up, in the order they were.
    """

    def __init__(
        self,
        model: Path,
        params: ScoreParams,
        engines: Engines | None = None,
        *,
        rows: int,
        trust_remote_code: bool = False,
    ) -> None:
        """Start the engines, which import vLLM while the caller does something else.

        rows: about as many as will be scored. engines: local_engines where None.
        """
        self.quarantined: list[Quarantined] = []
        self._model, self._params, self._trust_remote_code = model, params, trust_remote_code
        self._engines = engines or local_engines(params, rows)
        self._length: EngineLength | None = None
        self._probe: Probe | None = None
        self._plan: HeadPlan | None = None
        self._backend: str | None = None
        self._logs = itertools.count()
        for old in log_file("score").parent.glob("score.*.log"):
            old.unlink()  # of an earlier run, which would pass for this one's
        self._pool = Pool[Engine, pl.DataFrame, ScoredCall](self._engines.count, self._start, hopeless=_hopeless)

    @property
    def restarts(self) -> int:
        """Engines started after the first ones."""
        return self._pool.restarts

    @property
    def answered(self) -> int:
        """How many engines, replacements not counted, took part in what was scored."""
        return self._pool.answered

    def load_for(self, longest: int, limits: ModelLimits, plan: HeadPlan | None = None) -> str:
        """Build the engines for rows of up to `longest` tokens, check each by a probe, and return their backend.

        plan: of sketches for the rows that are marked in their column SKETCHED. Where not one engine can be built, none
        could later: EngineFailed. Raises RequestError for lengths that the params don't allow.
        """
        self._length = engine_length(longest, limits, self._params, what="responses with their prompts")
        self._plan = plan
        self._probe = make_probe(
            self._model,
            vocabulary=limits.vocabulary,
            longest=self._length.max_model_len - 1,
            dtype=self._params.dtype,
            quantization=self._params.quantization,
            trust_remote_code=self._trust_remote_code,
        )
        with activity(f"starting vLLM ({log_file('score')})"):
            found = self._pool.load(self._load)
        # All answer in the same way, replacements too, which don't try again what was refused.
        self._backend = next(iter(found.values()))
        for place, backend in found.items():
            if backend != self._backend:
                self._pool.drop(place, f"It answers by {backend}, the first by {self._backend}; it is started again.")
        return self._backend

    def _start(self, place: int) -> Engine:
        # A log of its own for each, so that those of the dead remain.
        number = next(self._logs)
        return self._engines.start(place, log_file(f"score.{number}" if number else "score"))

    def _load(self, engine: Engine) -> str:
        assert self._length is not None
        return engine.load(
            self._model,
            self._length,
            probe=self._probe,
            trust_remote_code=self._trust_remote_code,
            plan=self._plan,
            backend=self._backend,
        )

    def score(self, planned: Iterable[pl.DataFrame], advance: Advance) -> Iterator[ScoredCall]:
        """Yield every call as it is answered; those that ended an engine come last, in pieces, without what was set
        aside in `quarantined`.

        planned: drawn from as engines become free, in their threads. Raises RunFailed when engines go on dying, or the
        last one can't be replaced.
        """
        lock = Lock()

        def ask(engine: Engine, rows: pl.DataFrame) -> ScoredCall:
            inputs, progress = engine_rows(rows), _Revocable(advance, lock)
            try:
                if self._plan is None:
                    answer = engine.score(inputs, progress)
                else:
                    answer = engine.score(inputs, progress, sketched=rows[SKETCHED].to_list())
            except EngineFailed:
                progress.revoke()
                raise
            return ScoredCall(rows, inputs, answer)

        for _, answered in self._pool.answers(planned, ask, self._again):
            yield answered

    def _again(self, lost: Lost[pl.DataFrame]) -> list[pl.DataFrame]:
        """What to ask again of the rows that were in a call."""
        rows, died = lost.call, f"{lost.how} Its log is {lost.log}."
        if len(rows) == 1 and lost.deaths >= DEATHS_OF_A_ROW:
            key = rows["response_key"][0]
            self.quarantined.append(Quarantined(key, lost.how, lost.log))
            _say(f"{died} It is the third that response {key.hex()} was in; that one is set aside.")
            return []
        alone = lost.deaths > 1
        how = "one by one" if alone else "as they were"
        _say(f"{died} Another one takes over; {len(rows)} rows will be asked again, {how}.")
        return list(calls(rows, 1)) if alone else [rows]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._pool.__exit__(*raised)


class _Revocable:
    """Progress of one call, which can be taken back when its engine dies; calls of several engines share the lock."""

    def __init__(self, advance: Advance, lock: Lock) -> None:
        self._advance, self._lock = advance, lock
        self._rows = self._tokens = 0

    def __call__(self, rows: int, tokens: int = 0, /) -> None:
        self._rows += rows
        self._tokens += tokens
        with self._lock:
            self._advance(rows, tokens)

    def revoke(self) -> None:
        with self._lock:
            self._advance(-self._rows, -self._tokens)


def _hopeless(found: str) -> RunFailed:
    return RunFailed(
        f"{found} It is hardly the rows' doing: memory may be short (see "
        "score.max_num_batched_tokens, score.cpu_kv_cache_gib and score.gpu_memory_utilization), or "
        f"score.timeout_seconds. Their logs are {log_file('score').parent}/score*.log. "
        "Rows finished before are kept: run the same command again to go on from there."
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
