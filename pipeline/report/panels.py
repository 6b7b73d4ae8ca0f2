"""The learning curves that the report shows, in reading order: which metrics, their unit, and how to read them."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One learning-curve chart; with two metrics, the first is drawn solid and the second dashed."""

    key: str
    title: str
    metrics: tuple[str, ...]
    axis: str
    caption: str
    number_format: str = ".4~g"
    axis_format: str | None = None


PANELS = (
    Panel(
        key="rewards",
        title="Implicit rewards",
        metrics=("rewards/chosen", "rewards/rejected"),
        axis="β · nats",
        caption="Chosen solid, rejected dashed. Both start at 0, where the policy is the reference.",
    ),
    Panel(
        key="logps",
        title="Log-probabilities",
        metrics=("logps/chosen", "logps/rejected"),
        axis="nats per response",
        caption="Chosen solid, rejected dashed; summed over the tokens of a response.",
    ),
    Panel(
        key="margins",
        title="Reward margin",
        metrics=("rewards/margins",),
        axis="β · nats",
        caption="Chosen minus rejected reward, mean over the batch.",
    ),
    Panel(
        key="accuracies",
        title="Reward accuracy",
        metrics=("rewards/accuracies",),
        axis="share of pairs",
        caption="Pairs whose chosen response has the higher reward.",
        number_format=".1%",
        axis_format="~%",
    ),
    Panel(
        key="dcr",
        title="Degraded chosen responses (dcr)",
        metrics=("dcr",),
        axis="share of pairs",
        caption="Pairs whose chosen response has become less likely than under the reference.",
        number_format=".1%",
        axis_format="~%",
    ),
    Panel(
        key="offsets",
        title="Margin explained by offsets",
        metrics=("offsets/share",),
        axis="share of margin",
        caption="AuxDPO: how much of the margin its offsets make up instead of the policy, in absolute values.",
        number_format=".1%",
        axis_format="~%",
    ),
    Panel(
        key="null-space",
        title="Null-space penalty",
        metrics=("offsets/penalty",),
        axis="before its weight",
        caption="AuxDPO: squared norm of the offsets' sum of reference gradients, by the sketch they are fitted to.",
    ),
    Panel(
        key="loss",
        title="Loss",
        metrics=("loss",),
        axis="loss",
        caption="The objective itself; different objectives don't share a scale.",
    ),
    Panel(
        key="nll",
        title="Negative log-likelihood of chosen",
        metrics=("nll/chosen",),
        axis="nats per token",
        caption="How well the policy still models the responses people preferred.",
    ),
    Panel(
        key="in-distribution",
        title="In-distribution log-probability",
        metrics=("in_distribution_logp",),
        axis="nats",
        caption="log-sum-exp of both responses: falls when probability leaks to neither of them.",
    ),
    Panel(
        key="grad-norm",
        title="Gradient norm",
        metrics=("grad_norm",),
        axis="before clipping",
        caption="Spikes here come before instabilities in the loss.",
    ),
    Panel(
        key="throughput",
        title="Throughput",
        metrics=("tokens_per_second",),
        axis="tokens per second",
        caption="Prompt and response tokens of both sides that training consumed.",
        number_format=",.0f",
    ),
)
