"""The BDPO paper's toy: four prompts, four responses of which no pair holds two, and a two-layer network.

Each prompt has one pair; what that pair doesn't hold is out of distribution. Where responses are `two`, prompts 0 and 1
prefer response 0 to response 1, prompts 2 and 3 the other way round, and no pair holds response 2 or 3. Where they are
`all`, prompt i prefers response i to i + 1 (mod 4), so that its other two are in other prompts' pairs.

A policy is softmax(tanh(x W1 + b1) W2 + b2). Every setting, objective and seed is a network of its own; they are
trained at once, as leading dimensions (settings, objectives, seeds) of the same tensors, in float64.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from pipeline.objectives import OBJECTIVES, PairLogps
from pipeline.params import AnyVariant
from studies.pages.settings import Section

PROMPTS = RESPONSES = 4
# The response in each role (chosen, rejected, out of distribution twice), by prompt.
LAYOUTS = {
    "two": torch.tensor([[0, 1, 2, 3], [0, 1, 2, 3], [1, 0, 2, 3], [1, 0, 2, 3]]),
    "all": torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0], [2, 3, 0, 1], [3, 0, 1, 2]]),
}
FEATURES = PROMPTS + 1  # one that similar prompts share, and each prompt's own
FIT_RATE = 0.01
DRAWN = 18  # points of a trajectory, about evenly spaced in the logarithm of the step

Optimizer = Literal["adam", "descent"]
Network = dict[str, Tensor]


class Setting(Section):
    prompts: Literal["one_hot", "similar"]
    responses: Literal["two", "all"]
    optimizer: Optimizer
    reference: Annotated[list[float], Field(min_length=4, max_length=4)] | None  # chosen, rejected, the two others


class ToyParams(Section):
    seeds: int = Field(ge=2)
    hidden: int = Field(ge=1)
    steps: int = Field(ge=1)
    fit_steps: int = Field(ge=1)
    learning_rate: dict[Optimizer, float]
    settings: dict[str, Setting]
    objectives: dict[str, AnyVariant]
    drawn: list[str]  # the objectives of the figure


@dataclass(frozen=True)
class Run:
    """One objective in one setting, over the seeds; probabilities are means over the prompts."""

    steps: list[int]
    # (steps, seeds, 3): chosen, rejected, and the two out of distribution together
    trajectory: Tensor
    lowest_chosen_ratio: Tensor  # (seeds,): min over steps and prompts of pi_theta(chosen) / pi_ref(chosen)


def features(prompts: str) -> Tensor:
    """(PROMPTS, FEATURES), of norm 1: orthogonal, or with a cosine of 0.8 between any two."""
    own = torch.eye(PROMPTS, dtype=torch.float64)
    shared = torch.full((PROMPTS, 1), 2.0 if prompts == "similar" else 0.0, dtype=torch.float64)
    return F.normalize(torch.cat([shared, own], dim=1), dim=1)


def fresh(seed: int, hidden: int) -> Network:
    """Uniform in +-1/sqrt(fan in), as torch's linear layers."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, fan_in: int) -> Tensor:
        return (2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1).div(fan_in**0.5)

    return {
        "w1": uniform(FEATURES, hidden, fan_in=FEATURES),
        "b1": uniform(1, hidden, fan_in=FEATURES),
        "w2": uniform(hidden, RESPONSES, fan_in=hidden),
        "b2": uniform(1, RESPONSES, fan_in=hidden),
    }


def forward(network: Network, x: Tensor, roles: Tensor) -> Tensor:
    """Log-probs by role, (..., PROMPTS, 4): chosen, rejected, and the two out of distribution.

    x: (..., PROMPTS, FEATURES); roles: (..., PROMPTS, 4), the response in each.
    """
    hidden = torch.tanh(x @ network["w1"] + network["b1"])
    logps = F.log_softmax(hidden @ network["w2"] + network["b2"], dim=-1)
    return logps.gather(-1, roles.expand_as(logps))


def train(
    network: Network, loss_of: Callable[[], Tensor], optimizer: Optimizer, rate: float, steps: int
) -> Iterator[None]:
    """Take `steps` full-batch steps; yields after each. Networks don't share a number, so their loss is summed."""
    parameters = [tensor.requires_grad_() for tensor in network.values()]
    kind = torch.optim.Adam if optimizer == "adam" else torch.optim.SGD
    stepper = kind(parameters, lr=rate)
    for _ in range(steps):
        stepper.zero_grad()
        loss_of().backward()
        stepper.step()
        yield


def references(params: ToyParams, settings: Sequence[Setting], x: Tensor, roles: Tensor) -> Network:
    """One network for each setting and seed, fitted by cross-entropy to the setting's probabilities."""
    seeds = [fresh(seed, params.hidden) for seed in range(params.seeds)]
    stacked = {name: torch.stack([seed[name] for seed in seeds]) for name in seeds[0]}
    network = {name: tensor.expand(len(settings), 1, *tensor.shape).clone() for name, tensor in stacked.items()}
    untrained = torch.tensor([setting.reference is None for setting in settings])
    wanted = [setting.reference or [0.0] * RESPONSES for setting in settings]
    target = torch.tensor(wanted, dtype=torch.float64)[:, None, None, None]
    start = {name: tensor.clone() for name, tensor in network.items()}
    for _ in train(network, lambda: -(target * forward(network, x, roles)).sum(), "adam", FIT_RATE, params.fit_steps):
        pass
    with torch.no_grad():
        for name, tensor in network.items():
            tensor[untrained] = start[name][untrained]
    return {name: tensor.detach() for name, tensor in network.items()}


def run(params: ToyParams) -> dict[tuple[str, str], Run]:
    """By (setting, objective)."""
    runs: dict[tuple[str, str], Run] = {}
    for optimizer, rate in params.learning_rate.items():
        chosen = {name: setting for name, setting in params.settings.items() if setting.optimizer == optimizer}
        if chosen:
            runs |= _run(params, chosen, optimizer, rate)
    return runs


def _run(
    params: ToyParams, settings: Mapping[str, Setting], optimizer: Optimizer, rate: float
) -> dict[tuple[str, str], Run]:
    x = torch.stack([features(setting.prompts) for setting in settings.values()])[:, None, None]
    roles = torch.stack([LAYOUTS[setting.responses] for setting in settings.values()])[:, None, None]
    network = references(params, list(settings.values()), x, roles)
    reference = forward(network, x, roles)
    count = len(params.objectives)
    network = {name: tensor.expand(-1, count, *tensor.shape[2:]).clone() for name, tensor in network.items()}
    steps = drawn_steps(params.steps)
    trajectory = [probabilities(reference.expand(-1, count, *reference.shape[2:]))]
    lowest = torch.zeros(len(settings), count, params.seeds, dtype=torch.float64)

    def loss() -> Tensor:
        policy = forward(network, x, roles)
        losses = [objective_loss(v, policy[:, i], reference[:, 0]) for i, v in enumerate(params.objectives.values())]
        return torch.stack(losses).sum()

    for step, _ in enumerate(train(network, loss, optimizer, rate, params.steps), start=1):
        with torch.no_grad():
            policy = forward(network, x, roles)
            lowest = torch.minimum(lowest, (policy - reference)[..., 0].amin(dim=-1))
            if step in steps:
                trajectory.append(probabilities(policy))
    path = torch.stack(trajectory)
    return {
        (setting, objective): Run(steps, path[:, i, j], lowest[i, j].exp())
        for i, setting in enumerate(settings)
        for j, objective in enumerate(params.objectives)
    }


def objective_loss(variant: AnyVariant, policy: Tensor, reference: Tensor) -> Tensor:
    """Summed over networks, mean over prompts. policy, reference: (..., PROMPTS, 4) log-probs by role."""
    one = torch.ones_like(policy[..., 0]).flatten()
    chosen, rejected, ref_chosen, ref_rejected = (
        logps[..., role].flatten() for logps in (policy, reference) for role in (0, 1)
    )
    pair = PairLogps(chosen, rejected, ref_chosen, ref_rejected, one, one)
    losses = OBJECTIVES[variant.objective](pair, **variant.hyperparameters())
    return losses.sum() / PROMPTS


def probabilities(logps: Tensor) -> Tensor:
    """(..., seeds, 3) from (..., seeds, PROMPTS, 4): chosen, rejected, both others; mean over the prompts."""
    mean = logps.exp().mean(dim=-2)
    return torch.cat([mean[..., :2], mean[..., 2:].sum(dim=-1, keepdim=True)], dim=-1)


def drawn_steps(steps: int) -> list[int]:
    """0, and about DRAWN steps evenly spaced in their logarithm, the last one among them."""
    exponents = torch.linspace(0, 1, DRAWN, dtype=torch.float64)
    return [0, *sorted({round(steps**e) for e in exponents.tolist()})]
