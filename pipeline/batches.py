"""Which examples each optimizer step sees: a pure function of (seed, step), so a resumed run needs no sampler state."""

import math
from functools import lru_cache

import numpy as np


def steps_for(epochs: float, n_examples: int, batch_size: int) -> int:
    """Optimizer steps until every example was seen `epochs` times; batches run on over the end of an epoch."""
    return math.ceil(epochs * n_examples / batch_size)


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, n_examples: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n_examples)


def batch_indices(step: int, *, seed: int, n_examples: int, batch_size: int) -> np.ndarray:
    """The global batch of `step` (0-based): int64 (batch_size,), from an endless chain of shuffled epochs."""
    slots = np.arange(step * batch_size, (step + 1) * batch_size)
    return np.array([_epoch_order(seed, slot // n_examples, n_examples)[slot % n_examples] for slot in slots.tolist()])


def tokens_in(steps: int, lengths: np.ndarray, *, seed: int, batch_size: int) -> int:
    """Tokens of the first `steps` batches; lengths: tokens of every example."""
    batches = (batch_indices(s, seed=seed, n_examples=len(lengths), batch_size=batch_size) for s in range(steps))
    return sum(int(lengths[batch].sum()) for batch in batches)


def micro_batches(
    batch: np.ndarray, lengths: np.ndarray, *, rank: int, ranks: int, micro_batch_size: int
) -> list[np.ndarray]:
    """This rank's part of the global batch in micro-batches, as many on every rank; similar lengths together.

    batch: example indices (batch_size,). lengths: tokens of every example. batch_size is a multiple of ranks.
    """
    # Ranks draw from the length-sorted batch in turns, so that they finish together.
    by_length = batch[np.argsort(lengths[batch], kind="stable")]
    mine = by_length[rank::ranks]
    return np.array_split(mine, math.ceil(len(mine) / micro_batch_size))
