"""Pairs as token batches: which responses a set of pairs needs, what they cost, how they lie in memory."""

from pathlib import Path

import numpy as np
import polars as pl

from cache import locate
from pipeline.data.splitting import held_out_rows
from pipeline.data.tables import PAIR_SIDES, scan_examples, scan_responses
from pipeline.forward.logps import TokenBatch, collate, pack


class PairBatches:
    """The pairs of a folder's split, numbered as in its table, under one layout.

    keys: their response keys, a table of PAIR_SIDES. lengths: tokens of prompt + chosen plus prompt + rejected,
    (pairs,). groups: a number for each pair's prompt, (pairs,). response_lengths: (pairs, 2), chosen and rejected.
    """

    def __init__(
        self, pairs: Path, layout: str, *, split: str = "train", most: int | None = None, feedback: bool = False
    ) -> None:
        """layout: "padded", "packed" or "shared_prompts" (forward/layout.py). most: no more than so many pairs.

        feedback: a response and its mismatched one for chosen and rejected (data/tables.py: scan_examples).
        """
        self.layout = layout
        examples = scan_examples(pairs, split, feedback=feedback).collect()
        if most is not None:
            examples = examples[held_out_rows(len(examples), most)]
        self.keys = examples.select(PAIR_SIDES)
        self.desirable = examples["desirable"].to_numpy() if feedback else None  # bool, (pairs,)
        columns = ("response_key", "prompt_key", "prompt_ids", "response_ids")
        responses = scan_responses(pairs).filter(pl.col("split") == split).select(columns).collect()
        self._prompts, self._responses = responses["prompt_ids"], responses["response_ids"]
        self._prompt_tokens, self._response_tokens = (
            ids.list.len().to_numpy().astype(np.int64) for ids in (self._prompts, self._responses)
        )
        self._prompt_numbers = responses["prompt_key"].rank("dense").to_numpy().astype(np.int64)
        # (pairs, 2): chosen and rejected, as rows of the responses.
        self._sides = np.stack([locate(self.keys[side], responses["response_key"]) for side in PAIR_SIDES], axis=1)
        assert (self._sides >= 0).all()  # prepare writes every response of a pair
        self.lengths = (self._prompt_tokens + self._response_tokens)[self._sides].sum(axis=1)
        self.response_lengths = self._response_tokens[self._sides]
        self.groups = self._prompt_numbers[self._sides[:, 0]]

    def __len__(self) -> int:
        return len(self.keys)

    def tokens(self, pairs: np.ndarray) -> int:
        """Tokens of one forward over these pairs: padding counts, and once what is computed once."""
        rows, _ = self._rows(pairs)
        responses, prompts = self._response_tokens[rows], self._prompt_tokens[rows]
        if self.layout == "padded":
            return int((responses + prompts).max() * len(rows))
        if self.layout == "shared_prompts":
            prompts = prompts[np.unique(self._prompt_numbers[rows], return_index=True)[1]]
        return int(responses.sum() + prompts.sum())

    def batch(self, pairs: np.ndarray) -> tuple[TokenBatch, np.ndarray]:
        """The pairs' sequences, and of every chosen, then every rejected response its number among them, (2 pairs,)."""
        rows, places = self._rows(pairs)
        sequences = [(self._prompts[int(row)].to_numpy(), self._responses[int(row)].to_numpy()) for row in rows]
        if self.layout == "padded":
            return collate(sequences), places
        prompts = self._prompt_numbers[rows] if self.layout == "shared_prompts" else np.arange(len(rows))
        return pack(sequences, prompts), places

    def _rows(self, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sides = self._sides[pairs].T.ravel()
        if self.layout == "padded":  # the plain way: a response as often as it is in a pair
            return sides, np.arange(len(sides))
        rows, places = np.unique(sides, return_inverse=True)
        return rows, places
