"""Prepared tables of made-up pairs as long as UltraFeedback's, written in batches from a seed, and a model of zeros.

18,730 pairs of UltraFeedback have 41,588 distinct responses and 17 M tokens, a prompt counted with each of its
responses: 409 tokens a response. Here a prompt has two responses and, in 22 of 100 cases, a third that is in no pair.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.data.tables import PAIRS_SCHEMA, RESPONSES_SCHEMA, TableWriter

SEED = 20261128
VOCABULARY = 8192
POSITIONS = 1024  # prompt and response together are cut there, as prepare does
BATCH_PAIRS = 4_000
MEDIAN_PROMPT, PROMPT_SPREAD, LONGEST_PROMPT = 100, 0.95, 600  # tokens, lognormal
MEDIAN_RESPONSE, RESPONSE_SPREAD = 200, 0.8
CHARACTERS_A_TOKEN = 4
TEST_SHARE = 0.05
POOL = 1 << 22  # ids and characters, of which every sequence is a slice


class Batch:
    """Pairs first to first + n - 1: lengths, keys, and where in the pools their texts and ids start."""

    def __init__(self, first: int, n: int, pools: "Pools") -> None:
        rng = np.random.default_rng([SEED, first])
        self.first, self.n, self.pools = first, n, pools
        per_prompt = 2 + (rng.random(n) < 0.22)
        self.prompt = np.repeat(np.arange(n), per_prompt)  # of each response
        self.chosen = np.concatenate([[0], np.cumsum(per_prompt)[:-1]])  # the response that a pair's chosen one is
        rows = len(self.prompt)
        self.prompt_tokens = _lengths(rng, n, MEDIAN_PROMPT, PROMPT_SPREAD, LONGEST_PROMPT)
        response_tokens = _lengths(rng, rows, MEDIAN_RESPONSE, RESPONSE_SPREAD, POSITIONS)
        self.response_tokens = np.minimum(response_tokens, POSITIONS - self.prompt_tokens[self.prompt])
        self.prompt_start, self.response_start = rng.integers(
            0, POOL - POSITIONS * CHARACTERS_A_TOKEN, (2, max(rows, n))
        )
        self.prompt_keys, self.response_keys = _keys(rng, n), _keys(rng, rows)
        self.split = np.where(rng.random(n) < TEST_SHARE, "test", "train")

    def responses(self) -> pa.Table:
        rows, of = len(self.prompt), self.prompt
        prompt = self.prompt_start[: self.n][of], self.prompt_tokens[of]
        response = self.response_start[:rows], self.response_tokens
        columns = [
            self.response_keys,
            self.prompt_keys.take(pa.array(of)),
            self.split[of],
            self.pools.ids(*prompt),
            self.pools.ids(*response),
            np.zeros(rows, bool),
            self.pools.texts(*prompt),
            self.pools.texts(*response),
            pa.nulls(rows, pa.float32()),
        ]
        return pa.table([pa.array(column) for column in columns], schema=RESPONSES_SCHEMA)

    def pairs(self) -> pa.Table:
        sides = [(self.response_start[rows], self.response_tokens[rows]) for rows in (self.chosen, self.chosen + 1)]
        numbers = np.arange(self.first, self.first + self.n, dtype=np.int32)
        columns = [
            numbers,
            self.split,
            self.prompt_keys,
            *(self.response_keys.take(pa.array(rows)) for rows in (self.chosen, self.chosen + 1)),
            pa.nulls(self.n, pa.string()),
            self.pools.texts(self.prompt_start[: self.n], self.prompt_tokens),
            *(self.pools.texts(*side) for side in sides),
            pa.nulls(self.n, pa.float32()),
            pa.nulls(self.n, pa.float32()),
            [f"pairs.jsonl:{number + 1}" for number in numbers],
        ]
        return pa.table([pa.array(column) for column in columns], schema=PAIRS_SCHEMA)


class Pools:
    """One long random text and one long row of ids, rare ones rare; sequences are slices of them."""

    def __init__(self) -> None:
        rng = np.random.default_rng(SEED)
        letters = np.frombuffer(b"eeetttaaooiinnsshhrrdlcumwfgypbvk      ", np.uint8)
        self._text = rng.choice(letters, POOL)
        self._ids = np.minimum(np.exp(rng.random(POOL) * np.log(VOCABULARY)).astype(np.int32), VOCABULARY - 1)

    def ids(self, start: np.ndarray, tokens: np.ndarray) -> pa.Array:
        offsets, places = _places(start, tokens)
        return pa.ListArray.from_arrays(offsets, self._ids[places])

    def texts(self, start: np.ndarray, tokens: np.ndarray) -> pa.Array:
        offsets, places = _places(start, tokens * CHARACTERS_A_TOKEN)
        return pa.StringArray.from_buffers(len(start), pa.py_buffer(offsets), pa.py_buffer(self._text[places]))


def _places(start: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.concatenate([[0], np.cumsum(length)]).astype(np.int32)
    return offsets, np.arange(offsets[-1]) + np.repeat(start - offsets[:-1], length)


def _lengths(rng: np.random.Generator, n: int, median: int, spread: float, longest: int) -> np.ndarray:
    return np.clip(rng.lognormal(np.log(median), spread, n).astype(np.int64), 1, longest)


def _keys(rng: np.random.Generator, n: int) -> pa.Array:
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), n, [None, pa.py_buffer(rng.bytes(16 * n))])


def batches(n_pairs: int) -> Iterator[Batch]:
    pools = Pools()
    for first in range(0, n_pairs, BATCH_PAIRS):
        yield Batch(first, min(BATCH_PAIRS, n_pairs - first), pools)


def write_prepared(folder: Path, n_pairs: int) -> tuple[int, int]:
    """Write pairs.parquet and responses.parquet; returns responses and their tokens, those of prompts included.

    The same batches of 4,000 pairs come first, however many pairs there are; a last one that is cut is another.
    """
    rows = tokens = 0
    with (
        TableWriter(folder / "pairs.parquet", PAIRS_SCHEMA) as pairs,
        TableWriter(folder / "responses.parquet", RESPONSES_SCHEMA) as responses,
    ):
        for batch in batches(n_pairs):
            pairs.write(batch.pairs())
            responses.write(batch.responses())
            rows += len(batch.prompt)
            tokens += int(batch.response_tokens.sum() + batch.prompt_tokens[batch.prompt].sum())
    return rows, tokens


def write_model(folder: Path) -> Path:
    """A small Qwen2 whose weights are zero: every token's log-prob is -log(VOCABULARY)."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "tie_word_embeddings": False}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCABULARY, max_position_embeddings=POSITIONS, **sizes, **heads))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.save_pretrained(folder)
    return folder
