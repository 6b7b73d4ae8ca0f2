"""The study of misspecification: which policies DPO and AuxDPO end at, against the optimum of their class.

To first order in 1 / beta the KL-regularised optimum of the class is u / beta with u = F^-1 E_ref[g r] and
F = E_ref[g g^T] (arXiv 2510.20413). What DPO and AuxDPO find is some u, whatever beta, so one fit serves all betas.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field
from torch import Tensor

from studies.misspecification.bandit import (
    World,
    constraint,
    gain,
    gaussian_sketch,
    make_world,
    optimum,
    pair_weights,
    sample,
    sides,
    tensor_sketch,
)
from studies.misspecification.bandit_fit import fit
from studies.pages.settings import Section

PAIRS = ("reference", "uniform", "skewed")
SKETCHED = "skewed"  # the pairs on which sketches are tried
DPO, AUX, RIDGE = "DPO", "AuxDPO", "ridge alone"
BY_SIDES, SIDES_CENTRED = "by sides", "by sides, centred"
CENTRED, BOTH = "AuxDPO, centred", "AuxDPO and ridge"
METHODS = (DPO, AUX, BY_SIDES, SIDES_CENTRED, RIDGE)
DATA_METHODS = (DPO, AUX, CENTRED, BOTH, RIDGE)
TENSOR, GAUSSIAN = "TensorSketch", "Gaussian"


class DataParams(Section):
    prompts: int = Field(ge=2)
    responses: int = Field(ge=2)
    drawn: int = Field(ge=2)
    side: int = Field(ge=1)
    signal: float = Field(ge=0)


class MisspecificationParams(Section):
    worlds: int = Field(ge=2)
    prompts: int = Field(ge=2)
    responses: int = Field(ge=2)
    side: int = Field(ge=1)
    betas: list[float] = Field(min_length=2)
    spread: float = Field(ge=0)  # of the logarithm of a skewed pair's weight
    ridge: float = Field(gt=0)
    sketches: list[int] = Field(min_length=2)
    data: DataParams


@dataclass(frozen=True)
class Outcome:
    """A fit's success, by beta: share of the optimum's gain, and distance to the optimum over the optimum's length."""

    gains: list[float]
    distances: list[float]


@dataclass(frozen=True)
class Results:
    """Lists are over worlds."""

    tabular: dict[tuple[str, str], list[Outcome]]  # by (pairs, method)
    sketched: dict[tuple[str, int], list[Outcome]]  # by (sketch, k)
    data: dict[tuple[str, str], list[Outcome]]  # by (pairs, method)


def run(params: MisspecificationParams) -> Results:
    results = Results({}, {}, {})
    for seed in range(params.worlds):
        world = make_world(seed, params.prompts, params.responses, params.side)
        judge = _judge(world, params.betas)
        _add(results.tabular, _tabular(world, params, seed, judge))
        _add(results.sketched, _sketched(world, params, seed, judge))
        data = params.data
        whole = make_world(seed, data.prompts, data.responses, data.side, data.signal)
        _add(results.data, _data(sample(whole, data.drawn, seed), params, seed, _judge(whole, params.betas)))
    return results


Judge = Callable[[Tensor], Outcome]


def _judge(world: World, betas: list[float]) -> Judge:
    best = [optimum(world, beta) for beta in betas]

    def judge(u: Tensor) -> Outcome:
        return Outcome(
            [gain(world, u, beta, at) for beta, at in zip(betas, best, strict=True)],
            [((u / beta - at).norm() / at.norm()).item() for beta, at in zip(betas, best, strict=True)],
        )

    return judge


def _add(table: dict[Any, list[Outcome]], found: Mapping[Any, Outcome]) -> None:
    for key, outcome in found.items():
        table.setdefault(key, []).append(outcome)


def _tabular(world: World, params: MisspecificationParams, seed: int, judge: Judge) -> dict[tuple[str, str], Outcome]:
    found: dict[tuple[str, str], Outcome] = {}
    for kind in PAIRS:
        pairs = pair_weights(world, kind, seed, params.spread)
        by_sides = sides(world, pairs)
        fits = {
            DPO: fit(world, pairs, offsets=False),
            AUX: fit(world, pairs, constraint(world, world.weights)),
            BY_SIDES: fit(world, pairs, constraint(world, by_sides)),
            SIDES_CENTRED: fit(world, pairs, constraint(world, by_sides, centred=True)),
            RIDGE: fit(world, pairs, ridge=params.ridge),
        }
        found |= {(kind, method): judge(u) for method, (u, _) in fits.items()}
    return found


def _sketched(world: World, params: MisspecificationParams, seed: int, judge: Judge) -> dict[tuple[str, int], Outcome]:
    pairs, exact = pair_weights(world, SKETCHED, seed, params.spread), constraint(world, world.weights)
    found: dict[tuple[str, int], Outcome] = {}
    for k in params.sketches:
        sketches = {
            TENSOR: tensor_sketch(params.side, params.side, k, seed),
            GAUSSIAN: gaussian_sketch(params.side**2, k, seed),
        }
        found |= {(name, k): judge(fit(world, pairs, sketch @ exact)[0]) for name, sketch in sketches.items()}
    return found


def _data(world: World, params: MisspecificationParams, seed: int, judge: Judge) -> dict[tuple[str, str], Outcome]:
    found: dict[tuple[str, str], Outcome] = {}
    exact, centred = (constraint(world, world.weights, centred=centred) for centred in (False, True))
    for kind in (kind for kind in PAIRS if kind != "reference"):  # answers are draws from it already
        pairs = pair_weights(world, kind, seed, params.spread)
        fits = {
            DPO: fit(world, pairs, offsets=False),
            AUX: fit(world, pairs, exact),
            CENTRED: fit(world, pairs, centred),
            BOTH: fit(world, pairs, exact, ridge=params.ridge),
            RIDGE: fit(world, pairs, ridge=params.ridge),
        }
        found |= {(kind, method): judge(u) for method, (u, _) in fits.items()}
    return found
