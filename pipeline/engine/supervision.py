"""Engines die, hang and fail. Scoring goes on with another one, and a row that ends every engine is set aside.

Nobody can tell which row of a call ended an engine. So the rows that were in it are asked again in smaller calls, after
everything else: first in about the square root of as many (256 rows: 16 calls of 16), then each row alone. The row at
fault has then ended three engines, the last one alone, and its neighbours have been answered.
"""

import math
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self

import polars as pl

from pipeline.engine.probe import Probe, make_probe
from pipeline.engine.process import EngineProcess, Scored
from pipeline.engine.rows import SKETCHED, EngineLength, Row, calls, engine_length, engine_rows
from pipeline.errors import EngineFailed, RunFailed
from pipeline.model.limits import ModelLimits
from pipeline.params import ScoreParams
from pipeline.progress import Advance
from pipeline.sketches.head_plan import HeadPlan
from pipeline.workspace import log_file

DEATHS_OF_A_ROW = 3
# Beyond these it is hardly the rows: memory that runs out, a driver, a defect in the engine.
DEATHS_IN_ALL = 20
DEATHS_WITHOUT_AN_ANSWER = 8  # in a row; a poisonous row needs three, and some may stand side by side
STARTS = 2  # attempts at one replacement


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


class SupervisedEngine:
    """An engine for scoring that is replaced when it dies; a context manager.

    restarts: engines started after the first. quarantined: rows that were given up, in the order they were.
    """

    def __init__(self, model: Path, params: ScoreParams, *, trust_remote_code: bool = False) -> None:
        """Start the first engine's process, which imports vLLM while the caller does something else."""
        self.restarts = 0
        self.quarantined: list[Quarantined] = []
        self._model, self._params, self._trust_remote_code = model, params, trust_remote_code
        self._length: EngineLength | None = None
        self._probe: Probe | None = None
        self._plan: HeadPlan | None = None
        self._deaths = self._deaths_since_answer = 0
        for old in log_file("score").parent.glob("score.*.log"):
            old.unlink()  # of an earlier run, which would pass for this one's
        self._engine: EngineProcess | None = self._start()

    def load_for(self, longest: int, limits: ModelLimits, plan: HeadPlan | None = None) -> str:
        """Build the engine for rows of up to `longest` tokens, prompts included, check it by a probe, and return its
        backend.

        plan: of sketches for the rows that are marked in their column SKETCHED. An engine that fails now would fail
        again: EngineFailed is final here. Raises RequestError for lengths that the params don't allow.
        """
        length = engine_length(longest, limits, self._params, what="responses with their prompts")
        probe = make_probe(
            self._model,
            vocabulary=limits.vocabulary,
            longest=length.max_model_len - 1,
            dtype=self._params.dtype,
            quantization=self._params.quantization,
            trust_remote_code=self._trust_remote_code,
        )
        return self._load(length, probe, plan)

    def _load(self, length: EngineLength, probe: Probe, plan: HeadPlan | None) -> str:
        self._length, self._probe, self._plan = length, probe, plan
        assert self._engine is not None
        backend = self._engine.load(
            self._model, length, probe=probe, trust_remote_code=self._trust_remote_code, plan=plan
        )
        # Its replacements answer in the same way, and don't try again what was refused.
        self._params = self._params.model_copy(update={"backend": backend})
        return backend

    def score(self, planned: Iterable[pl.DataFrame], advance: Advance) -> Iterator[ScoredCall]:
        """Yield every call as it is answered; those that ended an engine come last, in pieces, without what was set
        aside in `quarantined`.

        Raises RunFailed when engines go on dying, or a dead one can't be replaced.
        """
        suspects: deque[tuple[pl.DataFrame, int]] = deque()  # (rows, deaths of each of them)
        for rows, deaths in _first_then(((call, 0) for call in planned), suspects):
            inputs, progress = engine_rows(rows), _Revocable(advance)
            engine = self._engine or self._replace()
            try:
                if self._plan is None:
                    answer = engine.score(inputs, progress)
                else:
                    answer = engine.score(inputs, progress, sketched=rows[SKETCHED].to_list())
            except EngineFailed as error:
                progress.revoke()
                self._engine = None
                suspects.extend(self._after_death(rows, deaths + 1, error, engine.log))
            else:
                self._deaths_since_answer = 0
                yield ScoredCall(rows, inputs, answer)

    def _after_death(
        self, rows: pl.DataFrame, deaths: int, error: EngineFailed, log: Path
    ) -> list[tuple[pl.DataFrame, int]]:
        """What to ask again of the rows that were in the call, whose `deaths` includes this one."""
        how = _first_line(error)
        self._deaths += 1
        self._deaths_since_answer += 1
        if len(rows) == 1 and deaths >= DEATHS_OF_A_ROW:
            key = rows["response_key"][0]
            self.quarantined.append(Quarantined(key, how, log))
            _say(f"{how} Its log is {log}. It is the third that response {key.hex()} was in; that one is set aside.")
            pieces = []
        else:
            size = 1 if deaths > 1 else math.isqrt(len(rows))
            pieces = [(piece, deaths) for piece in calls(rows, size)]
            _say(f"{how} Its log is {log}. Another one takes over; {len(rows)} rows will be asked again, by {size}.")
        self._give_up_where_it_is_not_the_rows(how)
        return pieces

    def _give_up_where_it_is_not_the_rows(self, how: str) -> None:
        if self._deaths_since_answer >= DEATHS_WITHOUT_AN_ANSWER:
            found = f"{self._deaths_since_answer} engines in a row died without an answer"
        elif self._deaths >= DEATHS_IN_ALL:
            found = f"{self._deaths} engines died in this run"
        else:
            return
        raise RunFailed(
            f"{found}, the last like this: {how} It is hardly the rows' doing: memory may be short (see "
            "score.max_num_batched_tokens, score.cpu_kv_cache_gib and score.gpu_memory_utilization), or "
            f"score.timeout_seconds. Their logs are {log_file('score').parent}/score*.log. "
            "Rows finished before are kept: run the same command again to go on from there."
        )

    def _replace(self) -> EngineProcess:
        assert self._length is not None and self._probe is not None
        failure: EngineFailed | None = None
        for _ in range(STARTS):
            self.restarts += 1
            engine = self._engine = self._start()
            try:
                self._load(self._length, self._probe, self._plan)
                return engine
            except EngineFailed as error:
                self._engine, failure = None, error
                _say(f"{_first_line(error)} Its log is {engine.log}.")
        raise EngineFailed(f"An engine died, and {STARTS} others could not take its place. {failure}")

    def _start(self) -> EngineProcess:
        # A log of its own for each, so that those of the dead remain.
        return EngineProcess(self._params, log=log_file(f"score.{self.restarts}" if self.restarts else "score"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        if self._engine is not None:
            self._engine.__exit__(*raised)


class _Revocable:
    """Progress of one call, which can be taken back when its engine dies."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance
        self._rows = self._tokens = 0

    def __call__(self, rows: int, tokens: int = 0, /) -> None:
        self._rows += rows
        self._tokens += tokens
        self._advance(rows, tokens)

    def revoke(self) -> None:
        self._advance(-self._rows, -self._tokens)


def _first_then(
    planned: Iterable[tuple[pl.DataFrame, int]], later: deque[tuple[pl.DataFrame, int]]
) -> Iterator[tuple[pl.DataFrame, int]]:
    """All of `planned`, then what is in `later` by then and is added to it meanwhile."""
    yield from planned
    with suppress(IndexError):
        while True:
            yield later.popleft()


def _first_line(error: EngineFailed) -> str:
    return str(error).partition("\n")[0]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
