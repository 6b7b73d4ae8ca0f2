"""A contextual bandit whose policy can't represent the reward: worlds, their optimum, pairs, constraints on offsets.

Many prompts, a few responses each, and a policy of far fewer parameters, pi_theta(y given x) proportional to
pi_ref(y given x) exp(<phi, theta>) with phi = f(x, y) (x) h(x): a bilinear layer, so that gradients are outer products
and TensorSketch applies. Prompts are equally likely. At the reference, theta = 0, and the gradient of
log pi(y given x) is g = phi - E_ref phi.

Shapes: X prompts, Y responses each, a and b features, d = a b parameters, P pairs a prompt. All in float64.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.sketches.hashes import IN, OUT, SKETCH, axis_hash, hash_words


@dataclass(frozen=True)
class World:
    """What there is to learn. f: (X, Y, a); h: (X, b); log_ref, reward: (X, Y); mean: E_ref phi, (X, 1, d)."""

    f: Tensor
    h: Tensor
    log_ref: Tensor
    reward: Tensor
    mean: Tensor

    @property
    def phi(self) -> Tensor:
        """(X, Y, d)."""
        return _outer(self.f, self.h)

    @property
    def weights(self) -> Tensor:
        """How often the reference gives each response to a prompt, (X, Y), over all prompts together 1."""
        return self.log_ref.exp() / len(self.log_ref)

    @property
    def gradients(self) -> Tensor:
        """Gradients of log pi at the reference, (X, Y, d)."""
        return self.phi - self.mean


def make_world(seed: int, prompts: int, responses: int, side: int, signal: float = 0.0) -> World:
    """d = side^2; everything is normal, the reference's logits too. signal: size of the rewards' part in the class."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    f, h = normal(prompts, responses, side), normal(prompts, side) / side**0.5
    log_ref, reward = normal(prompts, responses).log_softmax(dim=1), normal(prompts, responses)
    phi = _outer(f, h)
    reward = reward + signal * phi @ normal(side**2) / side**0.5
    return World(f, h, log_ref, reward, (log_ref.exp()[..., None] * phi).sum(dim=1, keepdim=True))


def _outer(f: Tensor, h: Tensor) -> Tensor:
    return (f[..., :, None] * h[:, None, None, :]).flatten(2)


def sample(world: World, responses: int, seed: int) -> World:
    """A data set of `responses` answers a prompt, drawn from the reference; each counts alike."""
    draw = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(world.log_ref.exp(), responses, replacement=True, generator=draw)
    f = world.f.gather(1, drawn[..., None].expand(-1, -1, world.f.shape[2]))
    even = torch.full(drawn.shape, 1 / responses, dtype=torch.float64).log()
    return replace(world, f=f, log_ref=even, reward=world.reward.gather(1, drawn))


# policies -------------------------------------------------------------------------------------------------------------


def value(world: World, theta: Tensor, beta: float) -> Tensor:
    """E[r] - beta KL(pi_theta || pi_ref), mean over prompts."""
    log_policy = (world.log_ref + world.phi @ theta).log_softmax(dim=1)
    return (log_policy.exp() * (world.reward - beta * (log_policy - world.log_ref))).sum(dim=1).mean()


def optimum(world: World, beta: float) -> Tensor:
    """The maximiser of `value` in the class, (d,), found directly."""
    theta = torch.zeros(world.phi.shape[2], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=500, tolerance_grad=1e-11, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -value(world, theta, beta)
        loss.backward()
        return loss

    optimizer.step(closure)
    return theta.detach()


def gain(world: World, u: Tensor, beta: float, best: Tensor) -> float:
    """The share, of what the optimum `best` gains over the reference in `value`, that u / beta gains."""
    start = value(world, torch.zeros_like(u), beta)
    return ((value(world, u / beta, beta) - start) / (value(world, best, beta) - start)).item()


# pairs and constraints ------------------------------------------------------------------------------------------------


def all_pairs(responses: int) -> tuple[Tensor, Tensor]:
    first, second = torch.triu_indices(responses, responses, offset=1)
    return first, second


def pair_weights(world: World, kind: str, seed: int = 0, spread: float = 2.0) -> Tensor:
    """How often each pair is compared, (X, P), sum 1: as two draws from the reference, alike, or log-normal."""
    first, second = all_pairs(world.reward.shape[1])
    if kind == "reference":
        found = world.weights[:, first] * world.weights[:, second]
    else:
        found = torch.ones(len(world.reward), len(first), dtype=torch.float64)
    if kind == "skewed":
        draw = torch.Generator().manual_seed(seed)
        found = (spread * torch.randn(found.shape, generator=draw, dtype=torch.float64)).exp()
    return found / found.sum()


def sides(world: World, pairs: Tensor) -> Tensor:
    """In what share of the sides of pairs each response stands, (X, Y)."""
    found = torch.zeros_like(world.reward)
    for side in all_pairs(world.reward.shape[1]):
        found.index_add_(1, side, pairs / 2)
    return found


def constraint(world: World, weights: Tensor, *, centred: bool = False) -> Tensor:
    """A, (d, X Y), with columns weights g, so that AuxDPO asks for A delta = 0.

    centred: without the weighted mean of each prompt, which an offset common to a prompt's responses could use.
    """
    g = world.gradients
    if centred:
        g = g - (weights[..., None] * g).sum(dim=1, keepdim=True) / weights.sum(dim=1)[:, None, None]
    return (weights[..., None] * g).flatten(0, 1).T


def tensor_sketch(a: int, b: int, k: int, seed: int) -> Tensor:
    """S, (k, a b): entry (i, j) of the weight goes to bucket h(i) + h'(j) mod k, as sketches/sums.py has it."""
    words = [hash_words("w", axis, n, seed=seed, purpose=SKETCH) for axis, n in ((OUT, a), (IN, b))]
    rows, columns = (axis_hash(each, k) for each in words)
    buckets = ((rows.buckets[:, None] + columns.buckets) % k).flatten()
    signs = (rows.signs[:, None] * columns.signs).flatten().double()
    return torch.zeros(k, a * b, dtype=torch.float64).index_put((buckets, torch.arange(a * b)), signs)


def gaussian_sketch(d: int, k: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(k, d, generator=draw, dtype=torch.float64).div(k**0.5)
