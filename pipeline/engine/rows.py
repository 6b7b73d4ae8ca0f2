"""What goes to the engine, in which order and in which calls, and as what it comes back. No engine is imported here."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa

from cache import logps_table
from pipeline.errors import RequestError
from pipeline.model.limits import ModelLimits
from pipeline.params import ScoreParams

Row = tuple[np.ndarray, np.ndarray]  # prompt ids and response ids, int32
ROW_COLUMNS = ["response_key", "prompt_key", "prompt_ids", "response_ids"]
_NO_TOKENS = np.empty(0, np.int32)
SKETCHED = "sketched"  # a column beside them: whether the engine sketches the row's head gradient, if it does so at all


class Sampling(NamedTuple):
    """How answers are drawn: `n` a prompt, each of at most `max_new_tokens`; temperature 0 is greedy.

    stop_token_ids end an answer and are its last token. stop: texts that end one; whatever follows within the last
    token is still there. An engine takes them only where it was given a tokenizer.
    """

    n: int
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()

    def seeds(self, seed: int, prompts: int) -> list[int]:
        """One for each of so many prompts, so far apart that no two answers share one: vLLM gives answer i seed + i."""
        return [seed * 1_000_003 + index * self.n for index in range(prompts)]


class EngineLength(NamedTuple):
    """max_model_len for vLLM in tokens; beyond_limit: it is one above the model's positions (see engine_length)."""

    max_model_len: int
    beyond_limit: bool


def engine_length(longest: int, limits: ModelLimits, params: ScoreParams, *, what: str) -> EngineLength:
    """vLLM's max_model_len for sequences of up to `longest` tokens. what: "responses with their prompts", say.

    vLLM always samples one token after a prompt, so it needs one more than the longest row. A row may fill the model's
    positions completely: the token sampled behind it is never fed back, so no position beyond the limit is computed,
    and vLLM may be told to accept that length. Raises RequestError where params.max_model_len is too small or large.
    """
    needed = longest + 1
    wanted = needed if params.max_model_len is None else params.max_model_len
    if wanted < needed:
        raise RequestError(
            f"score.max_model_len is {wanted}, but {what} have up to {longest} tokens, and vLLM needs one more. "
            f"Set it to {needed} or more, or to null."
        )
    if limits.positions is not None and wanted > limits.positions + 1:
        raise RequestError(
            f"score.max_model_len is {wanted}, but the model has {limits.positions} positions. "
            f"Set it to {limits.positions + 1} or less, or to null (longest row and one more, here {needed})."
        )
    return EngineLength(wanted, limits.positions is not None and wanted > limits.positions)


def longest_row(rows: pl.DataFrame) -> int:
    """Tokens of the longest prompt with response; 0 for no rows."""
    length = pl.col("prompt_ids").list.len() + pl.col("response_ids").list.len()
    return int(rows.select(length.max()).item() or 0)


def longest_prompt(prompts: pl.DataFrame) -> int:
    """Tokens of the longest of `prompt_ids`; 0 for none."""
    return int(prompts["prompt_ids"].list.len().max() or 0)  # type: ignore[arg-type]


def row_tokens(rows: pl.DataFrame) -> int:
    """Tokens of all prompts and responses, a prompt counted with each of its responses."""
    return int(rows.select(pl.col("prompt_ids", "response_ids").list.len().sum()).sum_horizontal().item())


def scoring_order(rows: pl.DataFrame) -> pl.DataFrame:
    """All rows in the order of scoring: prompts with their responses together, longest first, ties by key.

    Longest first shows at once whether memory suffices, and makes the estimate of remaining time an upper one. The
    order depends on the set of rows alone; so the rows that a killed run left over are the tail of the same order, fall
    into the same calls, and get the same numbers also where numbers depend on what else is in the batch (bfloat16).
    """
    length = pl.col("prompt_ids").list.len() + pl.col("response_ids").list.len()
    return (
        rows.with_columns(length.alias("_length"), length.max().over("prompt_key").alias("_group"))
        .sort("_group", "prompt_key", "_length", "response_key", descending=[True, False, True, False])
        .drop("_group", "_length")
    )


def calls(rows: pl.DataFrame, rows_per_call: int) -> Iterator[pl.DataFrame]:
    """Cut ordered rows into calls of at most `rows_per_call`, splitting only prompts that have more rows than that."""
    prompts = rows["prompt_key"].to_list()
    start = 0
    while start < len(prompts):
        stop = min(start + rows_per_call, len(prompts))
        if stop < len(prompts):
            first = stop
            while first > start and prompts[first - 1] == prompts[stop]:
                first -= 1
            stop = first if first > start else stop
        yield rows[start:stop]
        start = stop


class EngineRows(list[Row]):
    """Rows that cross a pipe as two arrays together, which takes a small part of the time of two arrays each."""

    def __reduce__(self) -> tuple[Any, ...]:
        parts = [part for row in self for part in row]
        return _unpacked, (np.concatenate([_NO_TOKENS, *parts]), np.array([len(part) for part in parts], np.int64))


def _unpacked(flat: np.ndarray, lengths: np.ndarray) -> EngineRows:
    parts = _cut(flat, np.concatenate([[0], np.cumsum(lengths)]))
    return EngineRows(zip(parts[::2], parts[1::2], strict=True))


def engine_rows(rows: pl.DataFrame) -> EngineRows:
    """(prompt ids, response ids) as int32 arrays, one pair a row, as EngineProcess.score takes them."""
    return EngineRows(zip(token_arrays(rows["prompt_ids"]), token_arrays(rows["response_ids"]), strict=True))


def scored_table(rows: pl.DataFrame, inputs: list[Row], logps: Sequence[np.ndarray]) -> pa.Table:
    """Rows for a journal: `inputs` (of `engine_rows`) and `logps` are in the order of `rows`, columns ROW_COLUMNS."""
    return logps_table(
        response_keys=rows["response_key"].to_list(),
        prompt_keys=rows["prompt_key"].to_list(),
        n_prompt_tokens=[len(prompt) for prompt, _ in inputs],
        token_ids=[response for _, response in inputs],
        token_logps=logps,
    )


def token_arrays(column: pl.Series) -> list[np.ndarray]:
    """A list column as one int32 array a row."""
    if not len(column):
        return []
    lists: Any = column.cast(pl.List(pl.Int32)).rechunk().to_arrow()
    bounds = lists.offsets.to_numpy()
    ids = np.array(lists.values[int(bounds[0]) : int(bounds[-1])], np.int32)  # of a slice, what lies around stays
    return _cut(ids, bounds - bounds[0])


def _cut(flat: np.ndarray, bounds: np.ndarray) -> list[np.ndarray]:
    """flat[bounds[i] : bounds[i + 1]] for each i; numpy.split does the same in ten times the time."""
    ends = bounds.tolist()
    return [flat[start:stop] for start, stop in pairwise(ends)]
