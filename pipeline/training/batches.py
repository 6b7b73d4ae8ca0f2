"""Which examples each optimizer step sees: a pure function of (seed, step), so a resumed run needs no sampler state."""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np


def steps_for(epochs: float, n_examples: int, batch_size: int) -> int:
    """Optimizer steps until every example was seen `epochs` times; batches run on over the end of an epoch."""
    return math.ceil(epochs * n_examples / batch_size)


class _Groups:
    """The very array, as a key of the cache below: its content would be compared for every batch."""

    def __init__(self, numbers: np.ndarray) -> None:
        self.numbers = numbers  # kept, so that no other array gets its id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Groups) and self.numbers is other.numbers

    def __hash__(self) -> int:
        return id(self.numbers)


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, n_examples: int, groups: _Groups | None) -> np.ndarray:
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(n_examples)
    if groups is None:
        return order
    _, numbers = np.unique(groups.numbers, return_inverse=True)
    # Groups shuffled, and within each its examples in the order drawn above.
    return order[np.argsort(random.permutation(numbers.max() + 1)[numbers[order]], kind="stable")]


def batch_indices(
    step: int, *, seed: int, n_examples: int, batch_size: int, groups: np.ndarray | None = None
) -> np.ndarray:
    """The global batch of `step` (0-based): int64 (batch_size,), from an endless chain of shuffled epochs.

    groups: int64 (n_examples,), those of one group stay next to each other; None: every example by itself. The same
    array for every step, and not changed in between: an epoch's order is drawn once.
    """
    key = None if groups is None else _Groups(groups)
    epochs, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), n_examples)
    parts = [
        _epoch_order(seed, epoch, n_examples, key)[places[epochs == epoch]]
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)
    ]
    return np.concatenate(parts)


def tokens_in(steps: int, lengths: np.ndarray, *, seed: int, batch_size: int, groups: np.ndarray | None = None) -> int:
    """Tokens of the first `steps` batches; lengths: tokens of every example; groups: as `batch_indices` has them."""
    batches = (
        batch_indices(s, seed=seed, n_examples=len(lengths), batch_size=batch_size, groups=groups) for s in range(steps)
    )
    return sum(int(lengths[batch].sum()) for batch in batches)


def micro_batches(
    batch: np.ndarray,
    groups: np.ndarray,
    tokens: Callable[[np.ndarray], int],
    *,
    rank: int,
    ranks: int,
    micro_batch_size: int,
    tokens_per_batch: int | None,
) -> list[np.ndarray]:
    """This rank's part of the global batch in micro-batches, as many on every rank; similar lengths together.

    batch: example indices (batch_size,), batch_size a multiple of ranks. groups: of every example; those of one group
    cost less together. tokens: of one forward over some examples. tokens_per_batch: their bound (an example that is
    larger gets a forward of its own); None: micro_batch_size examples each. Every rank gets equally many examples.
    """
    shares = _shares(batch, groups, tokens, ranks)
    if tokens_per_batch is None:
        return np.array_split(shares[rank], math.ceil(len(shares[rank]) / micro_batch_size))
    parts = [_filled(share, groups, tokens, tokens_per_batch) for share in shares]
    # Ranks meet in every backward pass, so they need equally many. There are enough examples for that: shares are
    # equally long, and no micro-batch is empty.
    return _divided(parts[rank], max(map(len, parts)), tokens)


def _shares(batch: np.ndarray, groups: np.ndarray, tokens: Callable[[np.ndarray], int], ranks: int) -> list[np.ndarray]:
    """Equally many examples for each rank, about equally many tokens, groups whole where that goes; shorter first."""
    size = len(batch) // ranks
    shares: list[list[np.ndarray]] = [[] for _ in range(ranks)]
    free, load = [size] * ranks, [0] * ranks
    # The longest group goes to the rank with the least, as long as it has room.
    for members in sorted(_by_group(batch, groups), key=tokens, reverse=True):
        while len(members):
            rank = min((r for r in range(ranks) if free[r]), key=lambda r: load[r])
            taken, members = members[: free[rank]], members[free[rank] :]
            shares[rank].insert(0, taken)
            free[rank] -= len(taken)
            load[rank] += tokens(taken)
    return [np.concatenate(share) for share in shares]


def _by_group(examples: np.ndarray, groups: np.ndarray) -> list[np.ndarray]:
    order = examples[np.argsort(groups[examples], kind="stable")]
    return np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)


def _filled(share: np.ndarray, groups: np.ndarray, tokens: Callable[[np.ndarray], int], bound: int) -> list[np.ndarray]:
    parts: list[np.ndarray] = []
    for members in np.split(share, np.flatnonzero(np.diff(groups[share])) + 1):
        # A group larger than the bound goes in pieces, which repeat its prompt.
        for piece in [members] if tokens(members) <= bound else np.split(members, len(members)):
            if parts and tokens(np.concatenate([parts[-1], piece])) <= bound:
                parts[-1] = np.concatenate([parts[-1], piece])
            else:
                parts.append(piece)
    return parts


def _divided(parts: list[np.ndarray], count: int, tokens: Callable[[np.ndarray], int]) -> list[np.ndarray]:
    parts = list(parts)
    while len(parts) < count:
        largest = max((i for i, part in enumerate(parts) if len(part) > 1), key=lambda i: tokens(parts[i]))
        parts[largest : largest + 1] = np.array_split(parts[largest], 2)
    return parts
