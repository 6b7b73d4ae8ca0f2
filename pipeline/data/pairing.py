"""Preferences and supervised examples -> the tables of pipeline/data/tables.py, in batches; all left out is counted."""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from cache.keys import prompt_key, response_key
from pipeline.data.dialogues import readable, text_of
from pipeline.data.encoding import Encoded, Encoder, Unusable
from pipeline.data.inputs import Inputs
from pipeline.data.preferences import Preference, SupervisedExample
from pipeline.data.splitting import side_of
from pipeline.data.spool import Kept, PairSpool
from pipeline.data.tables import SFT_SCHEMA, TOKENS, TableWriter
from pipeline.params import PrepareParams
from pipeline.progress import Advance
from pipeline.published.files import BadRow

BATCH_ROWS = 1000  # pairs or sft rows that are in memory at once
KEPT_BAD_ROWS = 20

_Batch = list[tuple[Preference | BadRow, str | None]]  # with the side; None: by the prompt's hash


@dataclass
class BadRows:
    """How many there were, and the first of them."""

    count: int = 0
    first: list[BadRow] = field(default_factory=list)

    def add(self, row: BadRow) -> None:
        self.count += 1
        if len(self.first) < KEPT_BAD_ROWS:
            self.first.append(row)


class _Pair(NamedTuple):
    preference: Preference
    split: str
    chosen: Encoded
    rejected: Encoded


@dataclass
class LongPrompts:
    """Prompts above prepare.max_prompt_tokens that were dropped."""

    prompts: set[bytes] = field(default_factory=set)
    pairs: int = 0


def spool_pairs(
    inputs: Inputs, encoder: Encoder, params: PrepareParams, spool: PairSpool, bad: BadRows, advance: Advance
) -> LongPrompts:
    """Encode, key and split all that is usable into `spool`. A split of None: by the prompt's hash."""
    long = LongPrompts()
    rows, done = inputs.preferences(), 0
    batches: deque[tuple[_Batch, Future[list[Encoded | Unusable]]]] = deque()

    def finish() -> None:
        batch, encoded = batches.popleft()
        pairs = list(_encoded(batch, encoded.result(), params, long, bad))
        if pairs:
            spool.add(*_columns(pairs))

    # The tokenizer works on all cores and without Python's lock, so the next rows are read meanwhile.
    with ThreadPoolExecutor(1) as pool:
        while batch := list(islice(rows, BATCH_ROWS)):
            texts = [
                (p.prompt, answer) for p, _ in batch if isinstance(p, Preference) for answer in (p.chosen, p.rejected)
            ]
            batches.append((batch, pool.submit(encoder.encode, texts)))
            if len(batches) > 1:
                finish()
            advance(inputs.rows_read - done)
            done = inputs.rows_read
        while batches:
            finish()
    return long


def _encoded(
    batch: _Batch, results: list[Encoded | Unusable], params: PrepareParams, long: LongPrompts, bad: BadRows
) -> Iterator[_Pair]:
    encoded = iter(results)
    for preference, split in batch:
        if isinstance(preference, BadRow):
            bad.add(preference)
            continue
        chosen, rejected = next(encoded), next(encoded)
        if isinstance(chosen, Unusable) or isinstance(rejected, Unusable):
            failed = next(side for side in (chosen, rejected) if isinstance(side, Unusable))
            if failed.prompt_too_long:
                long.prompts.add(blake2b(repr(preference.prompt).encode(), digest_size=16).digest())
                long.pairs += 1
            else:
                bad.add(BadRow(preference.where, failed.reason))
        elif np.array_equal(chosen.response_ids, rejected.response_ids):
            cut = f"after truncation to {params.max_tokens} tokens" if chosen.truncated else "as token ids"
            bad.add(BadRow(preference.where, f"chosen and rejected are identical {cut}"))
        else:
            text = readable(preference.prompt)
            side = split or side_of(text, seed=params.split_seed, test_share=params.test_share)
            yield _Pair(preference, side, chosen, rejected)


def _columns(pairs: list[_Pair]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What PairSpool.add takes."""
    preferences = [pair.preference for pair in pairs]
    encoded = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    prompt_keys = [prompt_key(pair.chosen.prompt_ids) for pair in pairs]
    keys = [response_key(side.prompt_ids, side.response_ids) for side in encoded]
    prompt_texts = [readable(p.prompt) for p in preferences]
    splits = [pair.split for pair in pairs]
    texts = [text_of(answer) for p in preferences for answer in (p.chosen, p.rejected)]
    rewards = [reward for p in preferences for reward in (p.chosen_reward, p.rejected_reward)]
    pair_columns = {
        "split": splits,
        "prompt_key": prompt_keys,
        "chosen_key": keys[::2],
        "rejected_key": keys[1::2],
        "category": [p.category for p in preferences],
        "prompt_text": prompt_texts,
        "chosen_text": texts[::2],
        "rejected_text": texts[1::2],
        "chosen_reward": rewards[::2],
        "rejected_reward": rewards[1::2],
        "source": [p.where for p in preferences],
    }
    response_columns = {
        "response_key": keys,
        "prompt_key": _twice(prompt_keys),
        "split": _twice(splits),
        "prompt_ids": _token_column([side.prompt_ids for side in encoded]),
        "response_ids": _token_column([side.response_ids for side in encoded]),
        "truncated": [side.truncated for side in encoded],
        "prompt_text": _twice(prompt_texts),
        "response_text": texts,
        "reward": rewards,
    }
    prompt_columns = {
        "prompt_tokens": pl.Series([len(pair.chosen.prompt_ids) for pair in pairs], dtype=pl.Int32),
        "prompt_truncated": pl.Series([pair.chosen.prompt_truncated for pair in pairs], dtype=pl.Boolean),
    }
    return pair_columns, response_columns, prompt_columns


def _twice(values: list[Any]) -> list[Any]:
    return [value for value in values for _ in range(2)]


class PairCounts:
    """What summary.json says of the pairs and responses that are written."""

    def __init__(self, kept: Kept, long: LongPrompts) -> None:
        self._kept, self._long = kept, long
        self._categories: Counter[str] = Counter()
        self._responses = self._response_tokens = self._truncated = self._longest = self._longest_sequence = 0

    def add_pairs(self, table: pa.Table) -> None:
        self._categories.update(table["category"].drop_null().to_pylist())

    def add_responses(self, table: pa.Table) -> None:
        lengths, prompts = (pc.list_value_length(table[name]).to_numpy() for name in ("response_ids", "prompt_ids"))
        self._responses += table.num_rows
        self._response_tokens += int(lengths.sum())
        self._truncated += pc.sum(table["truncated"]).as_py()
        self._longest = max(self._longest, int(lengths.max()))
        self._longest_sequence = max(self._longest_sequence, int((lengths + prompts).max()))

    def counts(self) -> dict[str, Any]:
        pairs = self._kept.keys
        prompts = pairs.unique("prompt_key", keep="last")
        sides = ("train", "test")
        return {
            "pairs": {side: pairs.filter(split=side).height for side in sides},
            "prompts": {side: prompts.filter(split=side).height for side in sides},
            "distinct_responses": self._responses,
            "tokens": {
                "prompts": int(prompts["prompt_tokens"].cast(pl.Int64).sum()),
                "responses": self._response_tokens,
                "longest_response": self._longest,
                "longest_sequence": self._longest_sequence,
            },
            "truncated_responses": self._truncated,
            "truncated_prompts": int(prompts["prompt_truncated"].sum()),
            "dropped_prompts_too_long": len(self._long.prompts),
            "dropped_pairs_prompt_too_long": self._long.pairs,
            "train_prompts_also_in_test": self._kept.overlap,
            "duplicate_pairs": self._kept.duplicates,
            "category_counts": dict(sorted(self._categories.items())),
        }


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
