"""Step 0: a policy that starts from the reference must answer as the reference cache says, or rewards start off zero.

With all log-ratios zero DPO's loss is log 2, and every other objective's loss is as well known; so the log-ratios are
what is checked. The drift gate before training knows a sample only; this sees every row of the first batch.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.data.tables import scan_examples
from pipeline.errors import RunFailed
from pipeline.objectives import PairLogps

# The tolerance is for the 99th percentile of drift, so one honest row in a hundred may lie above it, in bf16 most of
# all. Three times the tolerance is beyond that tail.
OUTLIER = 3.0
SIDES = ("chosen", "rejected")
_SUM = "start/drift"


class StartCheck:
    """Compares the first batch's policy log-probs, before any update, with the cached ones."""

    def __init__(self, reference: Path, pairs: Path, tolerance: float, *, feedback: bool = False) -> None:
        """pairs: folder of prepared pairs, whose training split `observe` numbers; tolerance: nats a response.

        feedback: of rows of feedback, whose mismatched response stands for the rejected one.
        """
        self.reference, self.pairs, self.tolerance, self.feedback = reference, pairs, tolerance, feedback
        self._worst = (0.0, "", 0)  # nats, side, number of the pair

    def observe(self, pair: PairLogps, micro: np.ndarray) -> dict[str, Tensor]:
        """The micro-batch's sum of |log-ratio|, for `judge`; RunFailed for a row far beyond the tolerance.

        pair: of the pairs numbered `micro`, (B,).
        """
        drift = torch.stack([pair.chosen_log_ratio, pair.rejected_log_ratio]).detach().abs()  # (2, B)
        side, place = divmod(int(drift.flatten().argmax()), len(micro))
        self._worst = max(self._worst, (float(drift[side, place]), SIDES[side], int(micro[place])))
        if self._worst[0] > OUTLIER * self.tolerance:
            raise RunFailed(self._message(f"{self._where()}, more than {OUTLIER:g} times what"))
        return {_SUM: drift.double().sum()}

    def judge(self, sums: dict[str, float], pairs: int) -> None:
        """Take the first batch's sum out of `sums`; RunFailed if its mean over responses exceeds the tolerance."""
        mean = sums.pop(_SUM, 0.0) / (2 * pairs)
        if mean > self.tolerance:
            raise RunFailed(self._message(f"{mean:.3g} nats on average ({self._where()}), more than"))

    def _where(self) -> str:
        value, side, number = self._worst
        sources = scan_examples(self.pairs, "train", feedback=self.feedback).select("source")
        if self.feedback:
            side = "mismatched" if side == "rejected" else "labelled"
        return f"{value:.3g} nats in the {side} response of {sources.slice(number, 1).collect().item()}"

    def _message(self, what: str) -> str:
        return (
            f"Before the first update the policy differs from {self.reference} by {what} train.drift_tolerance "
            f"({self.tolerance:g}) allows, although it starts from the reference's own weights. Rewards would start "
            f"off zero; nothing was trained. `refcache verify {self.reference} --drift --repair` finds such rows and "
            "scores them anew with transformers."
        )
