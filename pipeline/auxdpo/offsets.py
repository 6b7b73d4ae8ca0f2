"""AuxDPO's offsets while they train: one per response, with an optimiser of their own, the same on every rank.

The policy belongs to DeepSpeed; the offsets don't. Each rank adds the gradient of its own pairs' losses and that of
its share of the sketches; both are summed over ranks before Adam's step, so every rank makes the same step from the
same numbers, whatever the number of ranks and ZeRO's stage. The penalty's product with the sketches is divided among
ranks in this way too.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cache import key_bytes
from cache.key_set import KeyArray
from pipeline.auxdpo.nullspace import Projection, SketchedGradients
from pipeline.data.tables import write_table
from pipeline.errors import RunFailed
from pipeline.objectives import auxdpo
from pipeline.objectives.pair import PairLogps
from pipeline.params import AuxDPO

STATE, TABLE = "offsets.pt", "offsets.parquet"  # in a checkpoint; beside the policy
TABLE_SCHEMA = pa.schema(
    [pa.field("response_key", pa.binary(16), nullable=False), pa.field("offset", pa.float32(), nullable=False)]
)
_EXPLAINED, _POLICY = "offsets/|margins|", "rewards/|margins|"  # sums that end up in offsets/share
QUANTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)  # per cent


class Offsets:
    """delta of m responses in reward units, zero at first, and the constraint that keeps A delta small.

    keys: (m,), the responses; prompts: (m,), the number of each one's prompt. sides: (pairs, 2), which of them are
    chosen and rejected in each training pair. share, rows: the sketches that this rank holds, and of which responses
    they are; the ranks' shares together are all m.
    mean_square: mean ||g_j||^2, as `mean_squared_norm` takes it, the same on all ranks.
    sum_over_ranks: adds a tensor over all ranks, in place, and returns it. projection: for constraint "projection".
    """

    def __init__(
        self,
        keys: KeyArray,
        prompts: Tensor,
        sides: Tensor,
        share: SketchedGradients,
        rows: slice,
        params: AuxDPO,
        *,
        mean_square: float,
        sum_over_ranks: Callable[[Tensor], Tensor],
        projection: Projection | None = None,
    ) -> None:
        assert (projection is not None) == (params.constraint == "projection")
        self.keys, self.params = keys, params
        self.device = share.device
        self.prompts, self.sides = prompts.to(self.device), sides.to(self.device)
        self.weights = response_weights(sides, len(keys), params).to(self.device)
        self.values = torch.zeros(len(keys), device=self.device)
        self._mean_square = mean_square
        self.null_weights = self._null_weights(self.weights)
        self._share, self._rows, self._projection = share, rows, projection
        self._mine = torch.arange(len(keys), device=self.device)[rows]
        self._sum_over_ranks = sum_over_ranks
        # float64, so that the order in which micro-batches and ranks add does not matter.
        self._gradient = torch.zeros(len(keys), dtype=torch.float64, device=self.device)
        self._adam = torch.optim.Adam([self.values], lr=params.offset_learning_rate, foreach=False)

    def losses(self, pair: PairLogps, micro: np.ndarray, batch: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        """AuxDPO's loss of the pairs numbered `micro`, (B,), and sums over them for the history.

        The losses carry gradient for the policy alone; that for the offsets, of the mean over `batch`, is added at
        once, free of what DeepSpeed does to losses.
        """
        beta, delta = self.params.beta, self.of(micro).requires_grad_()
        fixed = PairLogps(*(values.detach() for values in pair))
        share = auxdpo(fixed, beta=beta, chosen_offset=delta[0], rejected_offset=delta[1]).sum() / len(batch)
        self.add(micro, torch.autograd.grad(share, delta)[0])
        chosen, rejected = delta.detach()
        margins = beta * (fixed.chosen_log_ratio - fixed.rejected_log_ratio)
        sums = {
            "offsets/margins": (chosen - rejected).sum(),
            _EXPLAINED: (chosen - rejected).abs().sum(),
            _POLICY: margins.abs().sum(),
        }
        return auxdpo(pair, beta=beta, chosen_offset=chosen, rejected_offset=rejected), sums

    def of(self, pairs: np.ndarray) -> Tensor:
        """Offsets of these pairs' chosen and rejected responses, (2, pairs); a copy."""
        return self.values[self._responses(pairs)]

    def add(self, pairs: np.ndarray, gradient: Tensor) -> None:
        """Take in a micro-batch's part of d loss / d offset, ordered as by `of`, (2, pairs)."""
        self._gradient.index_add_(0, self._responses(pairs).flatten(), gradient.flatten().double())

    def step(self, batch: np.ndarray, factor: float) -> dict[str, float]:
        """One step down the gradient that was added and the constraint's; returns what the history says before it.

        batch: the pairs of all ranks. factor: of the learning rate, as the policy's schedule has it. Collective. Raises
        RunFailed when offsets are no longer finite.
        """
        params, row = self.params, {"offsets/rms": float(self.values.square().mean().sqrt())}
        weight = self.null_weights.absolute
        if params.constraint == "penalty":
            row["offsets/penalty"] = self._add_penalty(self._share, self._mine, self.weights, weight)
        elif params.constraint == "batch":
            touched, coefficients = self._of_batch(batch)
            share = self._share.select(touched - self._rows.start)
            weight = self._null_weights(coefficients).absolute
            row["offsets/batch_penalty"] = self._add_penalty(share, touched, coefficients, weight)
            if params.null_weight is not None:
                row["offsets/null_weight_absolute"] = weight  # another one for each batch
        gradient = self._sum_over_ranks(self._gradient).float() + 2 * params.ridge * self.weights * self.values
        self.values.grad = gradient if self._projection is None else self._projection(gradient)
        self._adam.param_groups[0]["lr"] = factor * params.offset_learning_rate
        self._adam.step()
        if self._projection is not None:  # Adam scales each offset by itself, which leads out of the subspace
            self.values.copy_(self._projection(self.values))
        self._gradient.zero_()
        if not torch.isfinite(self.values).all():
            raise RunFailed(
                "AuxDPO's offsets became NaN or inf. Lower offset_learning_rate or "
                f"{'null_weight' if params.null_weight_absolute is None else 'null_weight_absolute'} and run again."
            )
        return row

    def _null_weights(self, coefficients: Tensor) -> "NullWeights":
        return null_weights(self.params, penalty_unit(coefficients, self._mean_square))

    def _add_penalty(self, share: SketchedGradients, responses: Tensor, coefficients: Tensor, weight: float) -> float:
        """Add this rank's part of the gradient of weight * ||sum_j c_j delta_j S g_j||^2; returns the square.

        delta is centred if that is wanted. responses: those of `share`, (n,). coefficients: c of all responses, (m,).
        """
        mine = coefficients[responses]
        penalty, slope = share.penalty(mine * self._centred(coefficients)[responses], self._sum_over_ranks)
        gradient = torch.zeros_like(self._gradient)
        gradient[responses] = (weight * mine * slope).double()
        if self.params.centred:
            sums = torch.zeros_like(gradient).index_add_(0, self.prompts, gradient)
            gradient -= prompt_shares(coefficients, self.prompts) * sums[self.prompts]
        self._gradient += gradient
        return float(penalty)

    def _centred(self, coefficients: Tensor) -> Tensor:
        """The offsets less their prompt's mean, weighted by `coefficients`, (m,)."""
        if not self.params.centred:
            return self.values
        weighted = prompt_shares(coefficients, self.prompts) * self.values
        means = torch.zeros_like(self.values).index_add_(0, self.prompts, weighted)
        return self.values - means[self.prompts]

    def _of_batch(self, batch: np.ndarray) -> tuple[Tensor, Tensor]:
        """The batch's responses that this rank has sketches of; and c: the weights as if there were only this batch."""
        weights = response_weights(self.sides[batch].cpu(), len(self.keys), self.params).to(self.device)
        touched = weights.nonzero()[:, 0]
        mine = (touched >= self._rows.start) & (touched < self._rows.stop)
        return touched[mine], weights

    def _responses(self, pairs: np.ndarray) -> Tensor:
        return self.sides[torch.from_numpy(pairs).to(self.device)].T

    def coefficients(self) -> Tensor:
        """c of the constraint's sum_j c_j g_j over all responses, (m,): w_j delta_j, centred if that is wanted."""
        return self.weights * self._centred(self.weights)

    def summary(self) -> dict[str, float]:
        """What the offsets are at the end. Collective.

        null_weight, null_weight_absolute: the penalty's weight in effect, in both units; for constraint "batch" only
        the one that was given. margins: mean delta_w - delta_l over the training pairs. penalty: ||sum_j w_j delta_j S
        g_j||^2 by the sketch they were fitted to, centred if that is wanted; penalty_audit: by the other one, which is
        honest. null_ratio: penalty over what it would be if all gradients were orthogonal; 0 in the null space, about 1
        for offsets that know nothing of gradients.
        """
        weighted = self.coefficients()[self._rows]
        sketched, audited = self._share.combine(weighted), weighted @ self._share.audit
        apart = sum(
            ((weighted[rows, None] * part).double().square().sum() for rows, part in self._share.chunks()),
            torch.zeros((), dtype=torch.float64, device=self.device),
        )
        penalty, audit = (float(self._sum_over_ranks(total.double()).square().sum()) for total in (sketched, audited))
        orthogonal = float(self._sum_over_ranks(apart))
        values = self.values.double().cpu().numpy()
        return {
            "responses": len(values),
            **self._told_weights(),
            "margins": float(np.mean(values[self.sides.cpu().numpy()] @ (1.0, -1.0))),
            "norm": float(np.linalg.norm(values)),
            "rms": float(np.sqrt(np.mean(values**2))),
            **{f"p{q:02d}": float(np.quantile(values, q / 100)) for q in QUANTILES},
            "penalty": penalty,
            "penalty_audit": audit,
            "null_ratio": penalty / orthogonal if orthogonal else 0.0,
        }

    def _told_weights(self) -> dict[str, float]:
        found = {"null_weight": self.null_weights.relative, "null_weight_absolute": self.null_weights.absolute}
        if self.params.constraint == "batch":
            return {name: weight for name, weight in found.items() if getattr(self.params, name) is not None}
        return found if self.params.constraint == "penalty" else {}

    def save(self, folder: Path) -> Path:
        """Write all that a resumed run needs; returns the file."""
        torch.save({"values": self.values, "adam": self._adam.state_dict()}, folder / STATE)
        return folder / STATE

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote."""
        state = torch.load(folder / STATE, weights_only=True, map_location=self.device)
        self.values.copy_(state["values"])
        self._adam.load_state_dict(state["adam"])

    def export(self, folder: Path) -> None:
        """Write offsets.parquet: response_key and offset (float32, reward units), sorted by key."""
        columns = [pa.array(key_bytes(self.keys), pa.binary(16)), pa.array(self.values.cpu().numpy())]
        write_table(pa.table(columns, schema=TABLE_SCHEMA), folder / TABLE, TABLE_SCHEMA)


def summarise_shares(row: dict[str, float]) -> dict[str, float]:
    """A history row with offsets/share, of |margin| explained by offsets: |d| / (|d| + |m|), d = delta_w - delta_l."""
    explained, policy = row.pop(_EXPLAINED), row.pop(_POLICY)
    return row | {"offsets/share": explained / (explained + policy) if explained else 0.0}


def response_weights(sides: Tensor, responses: int, params: AuxDPO) -> Tensor:
    """w, (responses,) float32, adding up to 1: equal for every response of `sides`, or by how often it is in one."""
    counts = torch.bincount(sides.flatten(), minlength=responses)
    if params.weights == "responses":
        counts = counts.clamp(max=1)
    return (counts.double() / counts.sum()).float()


class NullWeights(NamedTuple):
    """The penalty's weight: `relative` in units of `penalty_unit`, `absolute` as it multiplies the penalty."""

    relative: float
    absolute: float


def null_weights(params: AuxDPO, unit: float) -> NullWeights:
    if params.null_weight is not None:
        return NullWeights(params.null_weight, params.null_weight * unit)
    assert params.null_weight_absolute is not None
    return NullWeights(params.null_weight_absolute / unit, params.null_weight_absolute)


def penalty_unit(weights: Tensor, mean_square: float) -> float:
    """1 / (4 sum_j w_j^2 mean ||g||^2): m / (4 mean ||g||^2) where m responses weigh the same.

    With this weight the penalty bends by offsets as much as the mean loss can, on average over directions: the traces
    of the second derivatives are 2 weight sum_j w_j^2 ||g_j||^2, and at most 2/4 however many pairs there are.
    weights: (m,), with sum 1. inf where no gradient is longer than zero, and nothing is penalised.
    """
    curvature = 4 * float(weights.double().square().sum()) * mean_square
    return 1 / curvature if curvature else math.inf


def mean_squared_norm(norms: Tensor, weights: Tensor) -> float:
    """sum_j w_j^2 ||g_j||^2 / sum_j w_j^2, a plain mean where all weigh the same; both (m,), norms not squared."""
    squares = weights.double().square()
    return float((squares * norms.double().square()).sum() / squares.sum())


def prompt_shares(weights: Tensor, prompts: Tensor) -> Tensor:
    """Each weight over the sum of its prompt's, (m,); 0 where that is 0. prompts: (m,), numbers below m."""
    sums = torch.zeros_like(weights).index_add_(0, prompts, weights)[prompts]
    return torch.where(sums > 0, weights / sums, 0)
