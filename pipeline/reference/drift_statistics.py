"""Drift statistics in one pass and constant memory, however many tokens there are."""

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
        """The entries of `drift.drift_statistics`; all zero without rows."""
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
