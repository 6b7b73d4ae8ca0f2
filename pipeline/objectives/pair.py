"""What every preference objective receives: the sequence log-probs of a batch of pairs."""

from typing import Literal, NamedTuple

from torch import Tensor

OverTokens = Literal["sum", "mean"]


class PairLogps(NamedTuple):
    """Response log-probs summed over tokens, nats, float32, each (B,); lengths in tokens, (B,), at least 1.

    The reference's are data and carry no gradient.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor

    @property
    def chosen_log_ratio(self) -> Tensor:
        return self.chosen - self.ref_chosen

    @property
    def rejected_log_ratio(self) -> Tensor:
        return self.rejected - self.ref_rejected

    def chosen_nll(self, over_tokens: OverTokens) -> Tensor:
        """-log pi_theta(y_w), (B,): nats a response ("sum") or nats a token of that response ("mean")."""
        return -self.chosen if over_tokens == "sum" else -self.chosen / self.chosen_lengths
