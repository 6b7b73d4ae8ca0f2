"""What one model was asked and answered, kept by content: nothing is asked of it twice, and a kill loses one call.

Journals as the reference cache has them, but never its own: an engine that holds policies fills no reference cache.
Rows of text generation are kept under the digest of prompt, settings and seed.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import polars as pl
import pyarrow as pa

from cache import CacheError, Journal, ReferenceIdentity, prompt_key, response_key
from cache.identity import record_identity
from cache.schema import Kind
from pipeline.engine.process import EngineProcess
from pipeline.engine.rows import EngineLength, Sampling, calls, engine_rows, scored_table, scoring_order, token_arrays
from pipeline.params import ScoreParams
from pipeline.progress import Advance, progress_bar
from pipeline.workspace import answers_folder, log_file

Ask = Callable[[], EngineProcess]  # the engine that answers for this model; called when there is something to ask


@contextmanager
def on_demand(params: ScoreParams, model: Path, length: EngineLength, *, log: str, **options: Any) -> Iterator[Ask]:
    """An engine for one model, started when it is first asked for; options: of EngineProcess.load."""
    with ExitStack() as stack:
        started: list[EngineProcess] = []

        def ask() -> EngineProcess:
            if not started:
                started.append(stack.enter_context(EngineProcess(params, log=log_file(log))))
                started[0].load(model, length, **options)
            return started[0]

        yield ask


_KEY = pa.field("response_key", pa.binary(16), nullable=False)
_SCHEMA = pa.schema(
    [
        _KEY,  # of the question: prompt, settings, seed
        pa.field("answers", pa.list_(pa.list_(pa.int32())), nullable=False),  # token ids, `n` answers
    ]
)
_RANKED_SCHEMA = pa.schema(
    [_KEY, pa.field("logp", pa.float64(), nullable=False), pa.field("greedy", pa.bool_(), nullable=False)]
)


def _check_answers(table: pa.Table) -> None:
    if any(not answer for row in table["answers"].to_pylist() for answer in row):
        raise CacheError("an answer without a token: even one that ends at once has the token that ends it")


def _check_ranked(table: pa.Table) -> None:
    if not np.isfinite(table["logp"].to_numpy()).all():
        raise CacheError("a log-prob that is NaN or infinite. Nothing of this batch was stored.")


_SCORES_SCHEMA = pa.schema([_KEY, pa.field("score", pa.float64(), nullable=False)])


def _check_scores(table: pa.Table) -> None:
    if not np.isfinite(table["score"].to_numpy()).all():
        raise CacheError("a score that is NaN or infinite. Nothing of this batch was stored.")


_SCORES = Kind("scores", _SCORES_SCHEMA, [], [], _check_scores, "scores", "sample")
_ANSWERS = Kind("answers", _SCHEMA, [], [], _check_answers, "answers", "evaluate")
_RANKED = Kind("ranked", _RANKED_SCHEMA, [], [], _check_ranked, "log-probs", "evaluate")


class Ranked(NamedTuple):
    """Summed log-prob of a continuation, nats, and whether each of its tokens is the likeliest."""

    logp: float
    greedy: bool


class Answers:
    """The answers of one model; a context manager that holds the journals' locks (CacheLocked where another does)."""

    def __init__(self, identity: ReferenceIdentity, name: str, *, rows_per_call: int) -> None:
        """name: of the model, for progress lines."""
        self.identity, self.name, self._rows_per_call = identity, name, rows_per_call
        folder = answers_folder() / identity.reference_id
        self._logps, self._drawn = Journal(folder / "logps"), Journal(folder / "drawn", _ANSWERS)
        self._ranked = Journal(folder / "ranked", _RANKED)
        self._scores = Journal(folder / "scores", _SCORES)
        self._stack = ExitStack()
        self._sums: dict[bytes, float] | None = None
        self._found: dict[bytes, list[list[int]]] | None = None
        self._ranks: dict[bytes, Ranked] | None = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for journal in (self._logps, self._drawn, self._ranked, self._scores):
                stack.enter_context(journal)
            record_identity(self._logps.path.parent.parent, self.identity)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stack.close()

    # log-probs of given responses -------------------------------------------------------------------------------------

    def sums(self) -> dict[bytes, float]:
        """Summed log-prob in nats by response_key, of every response that was scored so far."""
        if self._sums is None:
            self._sums = {}
            for table in self._logps.tables():
                columns = (table[name].to_pylist() for name in ("response_key", "sum_logp"))
                self._sums |= zip(*columns, strict=True)
        return self._sums

    def unscored(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Those of `rows` (columns engine.rows.ROW_COLUMNS) that were not scored yet, each once."""
        return rows.unique("response_key", maintain_order=True).filter(~pl.col("response_key").is_in(list(self.sums())))

    def score(self, rows: pl.DataFrame, ask: Ask, what: str) -> dict[bytes, float]:
        """`sums` after all of `rows` were scored. what: "answers of the reference", say, for the progress line."""
        missing = scoring_order(self.unscored(rows))
        if len(missing):
            engine = ask()
            with progress_bar(f"{self.name}: {what}", len(missing)) as advance:
                for call in calls(missing, self._rows_per_call):
                    self._score_call(call, engine, advance)
        return self.sums()

    def _score_call(self, call: pl.DataFrame, engine: EngineProcess, advance: Advance) -> None:
        inputs = engine_rows(call)
        logps = engine.score(inputs, advance).logps
        self._logps.append(scored_table(call, inputs, logps))
        self.sums().update(
            zip(call["response_key"], (float(values.sum(dtype=np.float64)) for values in logps), strict=True)
        )

    # text generation --------------------------------------------------------------------------------------------------

    def draw(
        self, prompts: Sequence[np.ndarray], sampling: Sampling, seeds: Sequence[int], ask: Ask, what: str
    ) -> list[list[list[int]]]:
        """`sampling.n` answers a prompt as token ids, with the token that ended each; seeds: one a prompt."""
        found, keys = self._drawn_answers(), _questions(prompts, sampling, seeds)
        first = {key: index for index, key in reversed(list(enumerate(keys)))}  # a question may come twice
        missing = sorted(index for key, index in first.items() if key not in found)
        if missing:
            engine, size = ask(), max(1, self._rows_per_call // sampling.n)
            with progress_bar(f"{self.name}: {what}", len(missing) * sampling.n) as advance:
                for start in range(0, len(missing), size):
                    chosen = missing[start : start + size]
                    answers = engine.generate(
                        [prompts[i] for i in chosen], advance, sampling=sampling, seeds=[seeds[i] for i in chosen]
                    )
                    asked = [keys[i] for i in chosen]
                    self._drawn.append(_table(_SCHEMA, asked, answers))
                    found.update(zip(asked, answers, strict=True))
        return [found[key] for key in keys]

    def _drawn_answers(self) -> dict[bytes, list[list[int]]]:
        if self._found is None:
            self._found = {}
            for table in self._drawn.tables():
                columns = (table[name].to_pylist() for name in ("response_key", "answers"))
                self._found |= zip(*columns, strict=True)
        return self._found

    # continuations with ranks -----------------------------------------------------------------------------------------

    def rank(self, rows: pl.DataFrame, ask: Ask, what: str) -> dict[bytes, Ranked]:
        """Of each continuation by response_key; rows: columns engine.rows.ROW_COLUMNS, a row may come twice."""
        found = self._ranked_rows()
        missing = scoring_order(
            rows.unique("response_key", maintain_order=True).filter(~pl.col("response_key").is_in(list(found)))
        )
        if len(missing):
            engine = ask()
            with progress_bar(f"{self.name}: {what}", len(missing)) as advance:
                for call in calls(missing, self._rows_per_call):
                    answers = [
                        Ranked(float(of[:, 0].sum()), bool((of[:, 1] == 1).all()))
                        for of in engine.ranked(engine_rows(call), advance)
                    ]
                    asked = call["response_key"].to_list()
                    logps, greedy = zip(*answers, strict=True)
                    self._ranked.append(_table(_RANKED_SCHEMA, asked, logps, greedy))
                    found.update(zip(asked, answers, strict=True))
        return found

    # scores of a reward model -----------------------------------------------------------------------------------------

    def scores(self, sequences: Sequence[np.ndarray], ask: Ask, what: str) -> list[float]:
        """The logit of each sequence of token ids under a model with one class; a sequence may come twice."""
        found: dict[bytes, float] = {}
        for table in self._scores.tables():
            found |= zip(*(table[name].to_pylist() for name in table.column_names), strict=True)
        keys = [prompt_key(ids) for ids in sequences]
        first = {key: ids for key, ids in zip(keys, sequences, strict=True) if key not in found}
        missing = sorted(first, key=lambda key: (-len(first[key]), key))
        if missing:
            engine = ask()
            with progress_bar(f"{self.name}: {what}", len(missing)) as advance:
                for start in range(0, len(missing), self._rows_per_call):
                    asked = missing[start : start + self._rows_per_call]
                    logits = engine.classify([first[key] for key in asked], advance)
                    scores = [float(of.item()) for of in logits]
                    self._scores.append(_table(_SCORES_SCHEMA, asked, scores))
                    found.update(zip(asked, scores, strict=True))
        return [found[key] for key in keys]

    def _ranked_rows(self) -> dict[bytes, Ranked]:
        if self._ranks is None:
            self._ranks = {}
            for table in self._ranked.tables():
                for key, logp, greedy in zip(*(table[name].to_pylist() for name in table.column_names), strict=True):
                    self._ranks[key] = Ranked(logp, greedy)
        return self._ranks


def _table(schema: pa.Schema, *columns: Sequence[Any]) -> pa.Table:
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.table(arrays, schema=schema)


def _questions(prompts: Sequence[np.ndarray], sampling: Sampling, seeds: Sequence[int]) -> list[bytes]:
    """Digests (16 bytes) of what determines an answer beside the model."""
    settings = json.dumps(sampling._asdict(), sort_keys=True).encode()
    greedy = sampling.temperature == 0
    return [
        hashlib.blake2b(
            b"%d %d " % (0 if greedy else seed, len(prompt)) + prompt.astype("<i4").tobytes() + settings,
            digest_size=16,
            person=b"refcache-asked",
        ).digest()
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]


def answer_rows(prompts: pl.DataFrame, answers: Sequence[Sequence[Sequence[int]]]) -> pl.DataFrame:
    """One row an answer, the prompt's columns before it: response_ids, and response_key as of any other response."""
    counts = [len(of_prompt) for of_prompt in answers]
    flat = [answer for of_prompt in answers for answer in of_prompt]
    rows = prompts[np.repeat(np.arange(len(prompts)), counts)].with_columns(
        pl.Series("response_ids", flat, dtype=pl.List(pl.Int32))
    )
    keys = [
        response_key(prompt, answer)
        for prompt, answer in zip(token_arrays(rows["prompt_ids"]), token_arrays(rows["response_ids"]), strict=True)
    ]
    return rows.with_columns(pl.Series("response_key", keys, dtype=pl.Binary))
