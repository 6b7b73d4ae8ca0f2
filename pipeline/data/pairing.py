"""Preferences and supervised examples -> the tables of pipeline/data/tables.py, counting all that is left out."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from cache.keys import prompt_key, response_key
from pipeline.data.dialogues import readable, text_of
from pipeline.data.encoding import Encoded, Encoder, Unusable
from pipeline.data.files import BadRow
from pipeline.data.preferences import Preference, SupervisedExample
from pipeline.data.splitting import side_of
from pipeline.data.tables import PAIRS_SCHEMA, RESPONSES_SCHEMA, SFT_SCHEMA, TOKENS
from pipeline.params import PrepareParams


@dataclass
class PairTables:
    pairs: pa.Table
    responses: pa.Table
    bad: list[BadRow]
    counts: dict[str, Any]  # for summary.json


class SupervisedTable(NamedTuple):
    table: pa.Table
    bad: list[BadRow]
    counts: dict[str, Any]


class _Pair(NamedTuple):
    preference: Preference
    split: str
    chosen: Encoded
    rejected: Encoded
    prompt_key: bytes
    chosen_key: bytes
    rejected_key: bytes


@dataclass
class _Outcome:
    """What became of the preferences, gathered on the way."""

    bad: list[BadRow] = field(default_factory=list)
    long_prompts: set[Any] = field(default_factory=set)
    long_prompt_pairs: int = 0
    overlap: set[bytes] = field(default_factory=set)
    duplicates: int = 0


def pair_tables(
    preferences: Sequence[Preference], test: Sequence[Preference] | None, encoder: Encoder, params: PrepareParams
) -> PairTables:
    """Encode, key and split. Without `test`, prompts are split by hash; with it, its prompts leave the train side."""
    outcome = _Outcome()
    labelled = [(preference, "train" if test is not None else None) for preference in preferences]
    labelled += [(preference, "test") for preference in test or ()]
    pairs = _distinct(_separate(_encode(labelled, encoder, params, outcome), outcome), outcome)
    responses = _responses(pairs)
    return PairTables(_pairs_table(pairs), _responses_table(responses), outcome.bad, _counts(pairs, responses, outcome))


def _encode(
    labelled: Sequence[tuple[Preference, str | None]], encoder: Encoder, params: PrepareParams, outcome: _Outcome
) -> list[_Pair]:
    examples = [(p.prompt, text) for p, _ in labelled for text in (p.chosen, p.rejected)]
    encoded = iter(encoder.encode(examples, "pairs"))
    pairs = []
    for preference, split in labelled:
        chosen, rejected = next(encoded), next(encoded)
        if isinstance(chosen, Unusable) or isinstance(rejected, Unusable):
            failed = next(side for side in (chosen, rejected) if isinstance(side, Unusable))
            if failed.prompt_too_long:
                outcome.long_prompts.add(preference.prompt)
                outcome.long_prompt_pairs += 1
            else:
                outcome.bad.append(BadRow(preference.where, failed.reason))
        elif np.array_equal(chosen.response_ids, rejected.response_ids):
            cut = f"after truncation to {params.max_tokens} tokens" if chosen.truncated else "as token ids"
            outcome.bad.append(BadRow(preference.where, f"chosen and rejected are identical {cut}"))
        else:
            text = readable(preference.prompt)
            side = split or side_of(text, seed=params.split_seed, test_share=params.test_share)
            pairs.append(_keyed(preference, side, chosen, rejected))
    return pairs


def _keyed(preference: Preference, split: str, chosen: Encoded, rejected: Encoded) -> _Pair:
    prompt = chosen.prompt_ids
    keys = [response_key(prompt, response) for response in (chosen.response_ids, rejected.response_ids)]
    return _Pair(preference, split, chosen, rejected, prompt_key(prompt), *keys)


def _separate(pairs: list[_Pair], outcome: _Outcome) -> list[_Pair]:
    """Without the training pairs whose prompt is also a test prompt, be it by the input or by truncation."""
    test_keys = {pair.prompt_key for pair in pairs if pair.split == "test"}
    kept = []
    for pair in pairs:
        if pair.split == "train" and pair.prompt_key in test_keys:
            outcome.overlap.add(pair.prompt_key)
        else:
            kept.append(pair)
    return kept


def _distinct(pairs: list[_Pair], outcome: _Outcome) -> list[_Pair]:
    found: dict[tuple[bytes, bytes], _Pair] = {}
    for pair in pairs:
        found.setdefault((pair.chosen_key, pair.rejected_key), pair)
    outcome.duplicates = len(pairs) - len(found)
    return list(found.values())


def _responses(pairs: Iterable[_Pair]) -> list[dict[str, Any]]:
    """One row per response key, sorted by it; text and reward are those of the first pair that has them."""
    found: dict[bytes, dict[str, Any]] = {}
    for pair in pairs:
        p = pair.preference
        for key, encoded, text, reward in (
            (pair.chosen_key, pair.chosen, text_of(p.chosen), p.chosen_reward),
            (pair.rejected_key, pair.rejected, text_of(p.rejected), p.rejected_reward),
        ):
            row = found.setdefault(
                key,
                {
                    "response_key": key,
                    "prompt_key": pair.prompt_key,
                    "split": pair.split,
                    "encoded": encoded,
                    "prompt_text": readable(p.prompt),
                    "response_text": text,
                    "reward": reward,
                },
            )
            if row["reward"] is None:
                row["reward"] = reward
    return [found[key] for key in sorted(found)]


def _counts(pairs: list[_Pair], responses: list[dict[str, Any]], outcome: _Outcome) -> dict[str, Any]:
    sides = ("train", "test")
    prompts = {pair.prompt_key: pair for pair in pairs}
    categories = Counter(pair.preference.category for pair in pairs if pair.preference.category is not None)
    lengths = [len(row["encoded"].response_ids) for row in responses]
    totals = [len(row["encoded"].prompt_ids) + len(row["encoded"].response_ids) for row in responses]
    return {
        "pairs": {side: sum(pair.split == side for pair in pairs) for side in sides},
        "prompts": {side: sum(pair.split == side for pair in prompts.values()) for side in sides},
        "distinct_responses": len(responses),
        "tokens": {
            "prompts": sum(len(pair.chosen.prompt_ids) for pair in prompts.values()),
            "responses": sum(lengths),
            "longest_response": max(lengths, default=0),
            "longest_sequence": max(totals, default=0),
        },
        "truncated_responses": sum(row["encoded"].truncated for row in responses),
        "truncated_prompts": sum(pair.chosen.prompt_truncated for pair in prompts.values()),
        "dropped_prompts_too_long": len(outcome.long_prompts),
        "dropped_pairs_prompt_too_long": outcome.long_prompt_pairs,
        "train_prompts_also_in_test": len(outcome.overlap),
        "duplicate_pairs": outcome.duplicates,
        "category_counts": dict(sorted(categories.items())),
    }


def _pairs_table(pairs: list[_Pair]) -> pa.Table:
    preferences = [pair.preference for pair in pairs]
    columns = {
        "pair_id": list(range(len(pairs))),
        "split": [pair.split for pair in pairs],
        "prompt_key": [pair.prompt_key for pair in pairs],
        "chosen_key": [pair.chosen_key for pair in pairs],
        "rejected_key": [pair.rejected_key for pair in pairs],
        "category": [p.category for p in preferences],
        "prompt_text": [readable(p.prompt) for p in preferences],
        "chosen_text": [text_of(p.chosen) for p in preferences],
        "rejected_text": [text_of(p.rejected) for p in preferences],
        "chosen_reward": [p.chosen_reward for p in preferences],
        "rejected_reward": [p.rejected_reward for p in preferences],
        "source": [p.where for p in preferences],
    }
    return pa.table(columns, schema=PAIRS_SCHEMA)


def _responses_table(rows: list[dict[str, Any]]) -> pa.Table:
    columns: dict[str, Any] = {
        name: [row[name] for row in rows]
        for name in ("response_key", "prompt_key", "split", "prompt_text", "response_text", "reward")
    }
    columns["prompt_ids"] = _token_column([row["encoded"].prompt_ids for row in rows])
    columns["response_ids"] = _token_column([row["encoded"].response_ids for row in rows])
    columns["truncated"] = [row["encoded"].truncated for row in rows]
    return pa.table(columns, schema=RESPONSES_SCHEMA)


def supervised_table(examples: Sequence[SupervisedExample], encoder: Encoder) -> SupervisedTable:
    """One row per usable example, in order."""
    encoded = encoder.encode([(example.prompt, example.completion) for example in examples], "sft rows")
    usable = [(example, ids) for example, ids in zip(examples, encoded, strict=True) if isinstance(ids, Encoded)]
    failed = [(example, e) for example, e in zip(examples, encoded, strict=True) if isinstance(e, Unusable)]
    columns = {
        "prompt_ids": _token_column([ids.prompt_ids for _, ids in usable]),
        "response_ids": _token_column([ids.response_ids for _, ids in usable]),
        "prompt_text": [readable(example.prompt) for example, _ in usable],
        "response_text": [text_of(example.completion) for example, _ in usable],
    }
    counts = {
        "sft_rows": len(usable),
        "sft_tokens": sum(len(ids.prompt_ids) + len(ids.response_ids) for _, ids in usable),
        "sft_truncated_responses": sum(ids.truncated for _, ids in usable),
        "sft_truncated_prompts": sum(ids.prompt_truncated for _, ids in usable),
        "sft_dropped_prompts_too_long": sum(e.prompt_too_long for _, e in failed),
    }
    bad = [BadRow(example.where, e.reason) for example, e in failed if not e.prompt_too_long]
    return SupervisedTable(pa.table(columns, schema=SFT_SCHEMA), bad, counts)


def _token_column(rows: Sequence[np.ndarray]) -> pa.ListArray:
    offsets = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    values = np.concatenate([np.empty(0, dtype=np.int32), *rows])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), type=TOKENS)
