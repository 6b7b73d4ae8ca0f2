"""How far two sets of log-probs are apart: of all rows at once, or in one pass and constant memory."""

from collections.abc import Sequence
from typing import Any

import numpy as np

SMALLEST = 1e-12  # nats; below it, differences count as zero
LARGEST = 1e6
BINS_PER_DECADE = 1000  # neighbouring bins are 0.23 % apart


class DriftTally:
    """`drift_statistics` of rows that come one at a time: max and mean exact, p99 to half a bin."""

    def __init__(self) -> None:
        self._tokens, self._sequences = _Spread(), _Spread()

    def add(self, difference: np.ndarray) -> float:
        """Count one response; difference: cached - own token log-probs, float64. Returns its drift: |sum|, nats."""
        drift = abs(float(difference.sum()))
        self._tokens.add(np.abs(difference))
        self._sequences.add(np.array([drift]))
        return drift

    def statistics(self) -> dict[str, Any]:
        """The entries of `drift_statistics`; all zero without rows."""
        return {
            "responses": self._sequences.count,
            "tokens": self._tokens.count,
            "per_token": self._tokens.summary(),
            "per_sequence": self._sequences.summary(),
        }


class _Spread:
    def __init__(self) -> None:
        decades = np.log10(LARGEST / SMALLEST)
        self._bins = np.zeros(round(decades * BINS_PER_DECADE) + 1, dtype=np.int64)
        self.count, self._sum, self._max = 0, 0.0, 0.0

    def add(self, values: np.ndarray) -> None:
        places = np.log10(np.clip(values, SMALLEST, LARGEST) / SMALLEST) * BINS_PER_DECADE
        np.add.at(self._bins, np.rint(places).astype(np.int64), 1)
        self.count += len(values)
        self._sum += float(values.sum())
        self._max = max(self._max, float(values.max(initial=0.0)))

    def summary(self) -> dict[str, float]:
        spread = {"max": self._max, "mean": self._sum / max(1, self.count), "p99": self._quantile(0.99)}
        return {name: float(f"{value:.6g}") for name, value in spread.items()}

    def _quantile(self, share: float) -> float:
        """The smallest binned value that `share` of all values do not exceed; never above the maximum."""
        if not self.count:
            return 0.0
        place = int(np.searchsorted(self._bins.cumsum(), share * self.count))
        return min(self._max, SMALLEST * 10 ** (place / BINS_PER_DECADE)) if place else 0.0


def drift_statistics(cached: Sequence[np.ndarray], own: Sequence[np.ndarray]) -> dict[str, Any]:
    """Absolute differences in nats, per token and per sequence (of the sums), as max, mean and 99th percentile.

    cached, own: one array of token log-probs a response, of equal lengths.
    """
    differences = [difference(a, b) for a, b in zip(cached, own, strict=True)]
    per_token = np.abs(np.concatenate(differences))
    per_sequence = np.abs([one.sum() for one in differences])
    return {
        "responses": len(differences),
        "tokens": len(per_token),
        "per_token": _spread(per_token),
        "per_sequence": _spread(per_sequence),
    }


def worst_first(keys: Sequence[bytes], cached: Sequence[np.ndarray], own: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """One {"response_key" (hex), "n_tokens", "drift" (nats)} a response, largest drift first, ties by key."""
    rows = [
        {"response_key": key.hex(), "n_tokens": len(a), "drift": six_digits(abs(difference(a, b).sum()))}
        for key, a, b in zip(keys, cached, own, strict=True)
    ]
    return sorted(rows, key=lambda row: (-row["drift"], row["response_key"]))


def difference(cached: np.ndarray, own: np.ndarray) -> np.ndarray:
    """cached - own in float64; ValueError where the lengths differ, which numpy would broadcast for a single token."""
    if cached.shape != own.shape:
        raise ValueError(f"{len(cached)} cached token log-probs, but the trainer's forward gave {len(own)}")
    return cached.astype(np.float64) - own.astype(np.float64)


def _spread(values: np.ndarray) -> dict[str, float]:
    spread = {"max": values.max(), "mean": values.mean(), "p99": np.quantile(values, 0.99)}
    return {name: six_digits(value) for name, value in spread.items()}


def six_digits(value: float) -> float:
    """More digits would only say in which order the machine added."""
    return float(f"{value:.6g}")
