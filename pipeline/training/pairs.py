"""Pairs as token batches: which responses a set of pairs needs, what they cost, how they lie in memory."""

import numpy as np

from pipeline.forward.logps import TokenBatch, collate, pack
from pipeline.tokens.examples import Examples


class PairBatches:
    """Examples, numbered as in their table, under one layout; what grows with them lies in mapped files.

    lengths: tokens of prompt + chosen plus prompt + rejected, (pairs,). groups: a number for each pair's prompt,
    (pairs,). response_lengths: (pairs, 2), chosen and rejected. desirable: (pairs,) bool, of feedback alone.
    """

    def __init__(self, examples: Examples, layout: str) -> None:
        """layout: "padded", "packed" or "shared_prompts" (forward/layout.py)."""
        self.examples, self.layout = examples, layout
        self.lengths, self.groups = examples.lengths, examples.groups
        self.response_lengths, self.desirable = examples.response_lengths, examples.desirable

    def __len__(self) -> int:
        return len(self.examples)

    def tokens(self, pairs: np.ndarray) -> int:
        """Tokens of one forward over these pairs: padding counts, and once what is computed once."""
        rows, _ = self._rows(pairs)
        view = self.examples.tokens
        numbers = view.prompt_numbers[rows]
        responses = view.response_starts[rows + 1] - view.response_starts[rows]
        if self.layout == "shared_prompts":
            numbers = np.unique(numbers)
        prompts = view.prompt_starts[numbers + 1] - view.prompt_starts[numbers]
        if self.layout == "padded":
            return int((responses + prompts).max() * len(rows))
        return int(responses.sum() + prompts.sum())

    def batch(self, pairs: np.ndarray) -> tuple[TokenBatch, np.ndarray]:
        """The pairs' sequences, and of every chosen, then every rejected response its number among them, (2 pairs,)."""
        rows, places = self._rows(pairs)
        sequences = list(zip(*self.examples.tokens.gather(rows), strict=True))
        if self.layout == "padded":
            return collate(sequences), places
        numbers = self.examples.tokens.prompt_numbers[rows]
        return pack(sequences, numbers if self.layout == "shared_prompts" else np.arange(len(rows))), places

    def _rows(self, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sides = self.examples.rows[pairs].T.ravel()
        if self.layout == "padded":  # the plain way: a response as often as it is in a pair
            return sides, np.arange(len(sides))
        rows, places = np.unique(sides, return_inverse=True)
        return rows, places
