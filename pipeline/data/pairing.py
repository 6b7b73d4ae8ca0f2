"""Preferences and supervised examples -> the tables of pipeline/data/tables.py, in batches; all left out is counted."""

from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import blake2b
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa

from cache.keys import prompt_key, response_key
from pipeline.data.counting import BadRows, Tally
from pipeline.data.feedback import EncodedFeedback, Mismatches, feedback_columns
from pipeline.data.inputs import Inputs
from pipeline.data.preferences import Feedback, Preference, SupervisedExample
from pipeline.data.splitting import side_of
from pipeline.data.spool import PairSpool, prompt_counts
from pipeline.data.tables import SFT_SCHEMA, TOKENS, TableWriter
from pipeline.encoding.dialogues import Answer, Prompt, readable, text_of
from pipeline.encoding.encoder import Encoded, Encoder, Unusable
from pipeline.params import PrepareParams
from pipeline.progress import Advance
from pipeline.published.files import BadRow

BATCH_ROWS = 250  # input rows that are in memory at once

_Batch = list[tuple[Preference | Feedback | BadRow, str | None]]  # with the side; None: by the prompt's hash
_Usable = tuple[list["_Pair"], list[EncodedFeedback]]


class _Pair(NamedTuple):
    preference: Preference
    split: str
    chosen: Encoded
    rejected: Encoded


class _Side(NamedTuple):
    """One response as a row of responses.parquet."""

    prompt: Prompt
    split: str
    encoded: Encoded
    text: str
    key: bytes
    prompt_key: bytes
    reward: float | None = None


class PairStream:
    """Encodes, keys and splits the rows of `inputs` into a spool, counting what is left out."""

    def __init__(self, inputs: Inputs, encoder: Encoder, params: PrepareParams) -> None:
        self._inputs, self._encoder, self._params = inputs, encoder, params
        self._mismatches = Mismatches(encoder)
        self._tally = Tally()

    def spool(self, spool: PairSpool, first: int, last: int | None, advance: Advance) -> Tally:
        """The input rows from `first`, a multiple of BATCH_ROWS, to before `last` (None: to the end)."""
        rows = self._inputs.preferences(first, last)
        waiting: deque[Future[_Usable]] = deque()

        def finish() -> None:
            pairs, feedback = waiting.popleft().result()
            if pairs:
                sides = _sides_of_pairs(pairs)
                spool.add_pairs(_pair_columns(pairs, sides), *_response_columns(sides))
            if feedback:
                sides = _sides_of_feedback(feedback)
                spool.add_feedback(feedback_columns(feedback), *_response_columns(sides))

        # The tokenizer works on all cores and without Python's lock, so the next rows are read meanwhile.
        with ThreadPoolExecutor(1) as pool:
            while batch := list(islice(rows, BATCH_ROWS)):
                waiting.append(pool.submit(self._usable, list(chain.from_iterable(batch))))
                if len(waiting) > 1:
                    finish()
                advance(len(batch))
            while waiting:
                finish()
        forms = self._inputs.forms
        self._tally.forms, self._tally.ties = forms.found, forms.ties
        self._tally.seen, self._tally.used = forms.seen, forms.used
        self._tally.unrendered, self._tally.within = self._encoder.unrendered, self._mismatches.within
        return self._tally

    def _usable(self, batch: _Batch) -> _Usable:
        texts = [(row.prompt, answer) for row, _ in batch if not isinstance(row, BadRow) for answer in _answers(row)]
        encoded = iter(self._encoder.encode(texts))
        pairs: list[_Pair] = []
        feedback: list[tuple[Feedback, str, Encoded]] = []
        for row, split in batch:
            if isinstance(row, BadRow):
                self._tally.bad.add(row)
                continue
            sides = [next(encoded) for _ in _answers(row)]
            good = [side for side in sides if isinstance(side, Encoded)]
            if len(good) < len(sides):
                self._leave_out(row, next(side for side in sides if isinstance(side, Unusable)))
                continue
            side = split or side_of(
                readable(row.prompt), seed=self._params.split_seed, test_share=self._params.test_share
            )
            if isinstance(row, Feedback):
                feedback.append((row, side, good[0]))
            elif same := sameness(good[0], good[1], self._params.max_tokens):
                self._tally.bad.add(BadRow(row.where, same))
            else:
                pairs.append(_Pair(row, side, *good))
                if self._params.feedback:
                    feedback += zip(_halves(row), [side, side], good, strict=True)
        usable = []
        for found in self._mismatches.encode(feedback):
            if isinstance(found, BadRow):
                self._tally.bad.add(found)
            else:
                usable.append(found)
        return pairs, usable

    def _leave_out(self, row: Preference | Feedback, why: Unusable) -> None:
        if why.prompt_too_long:
            self._tally.long.prompts.add(blake2b(repr(row.prompt).encode(), digest_size=16).digest())
            self._tally.long.rows += 1
        else:
            self._tally.bad.add(BadRow(row.where, why.reason))


def sameness(chosen: Encoded, rejected: Encoded, max_tokens: int) -> str | None:
    """Why the two sides of a pair can't be told apart, or None. max_tokens: what they were cut to."""
    if not np.array_equal(chosen.response_ids, rejected.response_ids):
        return None
    cut = f"after truncation to {max_tokens} tokens" if chosen.truncated else "as token ids"
    return f"chosen and rejected are identical {cut}"


def _answers(row: Preference | Feedback) -> list[Answer]:
    return [row.chosen, row.rejected] if isinstance(row, Preference) else [row.response]


def _halves(pair: Preference) -> list[Feedback]:
    return [
        Feedback(pair.where, pair.prompt, answer, desirable, pair.category)
        for answer, desirable in ((pair.chosen, True), (pair.rejected, False))
    ]


def _pair_columns(pairs: list[_Pair], sides: list[_Side]) -> dict[str, Any]:
    """Of PAIRS_SCHEMA, without the number. sides: of `_sides_of_pairs`."""
    preferences = [pair.preference for pair in pairs]
    return {
        "split": [pair.split for pair in pairs],
        "prompt_key": [side.prompt_key for side in sides[::2]],
        "chosen_key": [side.key for side in sides[::2]],
        "rejected_key": [side.key for side in sides[1::2]],
        "category": [p.category for p in preferences],
        "prompt_text": [readable(p.prompt) for p in preferences],
        "chosen_text": [side.text for side in sides[::2]],
        "rejected_text": [side.text for side in sides[1::2]],
        "chosen_reward": [p.chosen_reward for p in preferences],
        "rejected_reward": [p.rejected_reward for p in preferences],
        "source": [p.where for p in preferences],
    }


def _sides_of_pairs(pairs: list[_Pair]) -> list[_Side]:
    """Chosen and rejected in turn."""
    sides = []
    for (_, prompt, *answers, _, chosen_reward, rejected_reward), split, chosen, rejected in pairs:
        key = prompt_key(chosen.prompt_ids)
        for encoded, answer, reward in zip((chosen, rejected), answers, (chosen_reward, rejected_reward), strict=True):
            sides.append(_side(prompt, split, encoded, answer, key, reward))
    return sides


def _side(
    prompt: Prompt, split: str, encoded: Encoded, answer: Answer, asked: bytes, reward: float | None = None
) -> _Side:
    key = response_key(encoded.prompt_ids, encoded.response_ids)
    return _Side(prompt, split, encoded, text_of(answer), key, asked, reward)


def _sides_of_feedback(rows: list[EncodedFeedback]) -> list[_Side]:
    return [
        _side(row.feedback.prompt, row.split, encoded, answer, prompt_key(encoded.prompt_ids))
        for row in rows
        for encoded, answer in ((row.response, row.feedback.response), (row.mismatched, row.other.response))
    ]


def _response_columns(sides: list[_Side]) -> tuple[dict[str, Any], dict[str, pl.Series]]:
    """Columns of RESPONSES_SCHEMA; and of every second side's prompt those of `prompt_counts`."""
    columns = {
        "response_key": [side.key for side in sides],
        "prompt_key": [side.prompt_key for side in sides],
        "split": [side.split for side in sides],
        "prompt_ids": _token_column([side.encoded.prompt_ids for side in sides]),
        "response_ids": _token_column([side.encoded.response_ids for side in sides]),
        "truncated": [side.encoded.truncated for side in sides],
        "prompt_text": [readable(side.prompt) for side in sides],
        "response_text": [side.text for side in sides],
        "reward": [side.reward for side in sides],
    }
    prompts = [side.encoded for side in sides[::2]]
    return columns, prompt_counts([len(p.prompt_ids) for p in prompts], [p.prompt_truncated for p in prompts])


def write_supervised(
    examples: Iterable[SupervisedExample | BadRow], encoder: Encoder, writer: TableWriter, bad: BadRows
) -> dict[str, Any]:
    """One row per usable example, in order; returns what summary.json says of them."""
    counts = dict.fromkeys(
        ("sft_rows", "sft_tokens", "sft_truncated_responses", "sft_truncated_prompts", "sft_dropped_prompts_too_long"),
        0,
    )
    rows = iter(examples)
    while batch := list(islice(rows, BATCH_ROWS)):
        usable = [row for row in batch if isinstance(row, SupervisedExample)]
        for row in batch:
            if isinstance(row, BadRow):
                bad.add(row)
        encoded = encoder.encode([(example.prompt, example.completion) for example in usable])
        good = []
        for example, ids in zip(usable, encoded, strict=True):
            if isinstance(ids, Encoded):
                good.append((example, ids))
            elif ids.prompt_too_long:
                counts["sft_dropped_prompts_too_long"] += 1
            else:
                bad.add(BadRow(example.where, ids.reason))
        if good:
            writer.write(_supervised_table(good))
        counts["sft_rows"] += len(good)
        counts["sft_tokens"] += sum(len(ids.prompt_ids) + len(ids.response_ids) for _, ids in good)
        counts["sft_truncated_responses"] += sum(ids.truncated for _, ids in good)
        counts["sft_truncated_prompts"] += sum(ids.prompt_truncated for _, ids in good)
    return counts


def _supervised_table(rows: list[tuple[SupervisedExample, Encoded]]) -> pa.Table:
    columns = {
        "prompt_ids": _token_column([ids.prompt_ids for _, ids in rows]),
        "response_ids": _token_column([ids.response_ids for _, ids in rows]),
        "prompt_text": [readable(example.prompt) for example, _ in rows],
        "response_text": [text_of(example.completion) for example, _ in rows],
    }
    return pa.table(columns, schema=SFT_SCHEMA)


def _token_column(rows: Sequence[np.ndarray]) -> pa.ListArray:
    offsets = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    values = np.concatenate([np.empty(0, dtype=np.int32), *rows])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), type=TOKENS)
