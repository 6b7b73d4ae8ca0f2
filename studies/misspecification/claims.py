"""What the runs say to each claim on misspecification."""

from collections.abc import Iterator
from itertools import pairwise

from studies.misspecification.worlds import (
    AUX,
    BOTH,
    BY_SIDES,
    CENTRED,
    DPO,
    GAUSSIAN,
    PAIRS,
    RIDGE,
    SKETCHED,
    TENSOR,
    MisspecificationParams,
    Outcome,
    Results,
)
from studies.pages.intervals import Mean, mean_interval
from studies.pages.markdown import Claim

REACHED, NEAR = 0.99, 0.01  # share of the optimum's gain that counts as reaching it; difference that counts as none


def gain_at(outcomes: list[Outcome], beta: int = -1) -> Mean:
    """Share of the optimum's gain at the beta of this index, mean over worlds."""
    return mean_interval([outcome.gains[beta] for outcome in outcomes])


def distance_at(outcomes: list[Outcome], beta: int = -1) -> Mean:
    return mean_interval([outcome.distances[beta] for outcome in outcomes])


def percent(share: Mean) -> str:
    """`98.1 ± 0.2 %`."""
    return f"{Mean(100 * share.value, 100 * share.half).show(1)} %"


def papers_claims(params: MisspecificationParams, results: Results) -> Iterator[Claim]:
    table, beta = results.tabular, params.betas[-1]
    distances = [distance_at(table[SKETCHED, AUX], i).value for i in range(len(params.betas))]
    halved = [
        b / a < 0.6 * (low / high) * 2
        for (a, b), (low, high) in zip(pairwise(distances), pairwise(params.betas), strict=True)
    ]
    yield Claim(
        f"AuxDPO reaches the class's optimum as β grows, whichever pairs are compared ({REACHED:.0%} at β = {beta:g})",
        all(gain_at(table[kind, AUX]).value > REACHED for kind in PAIRS),
        "; ".join(f"{kind} {percent(gain_at(table[kind, AUX]))}" for kind in PAIRS),
    )
    yield Claim(
        "Its distance to the optimum, relative to the optimum's length, falls as 1/β",
        all(halved),
        ", ".join(f"{d:.4f}" for d in distances) + f" at β = {', '.join(f'{b:g}' for b in params.betas)}",
    )
    spread = max(
        abs(table[kind, AUX][world].gains[i] - table[PAIRS[0], AUX][world].gains[i])
        for kind in PAIRS
        for world in range(params.worlds)
        for i in range(len(params.betas))
    )
    yield Claim(
        "AuxDPO's policy does not depend on which pairs are compared", spread < 1e-3, f"at most {spread:.0e} apart"
    )
    yield Claim(
        f"DPO does not reach it, whichever pairs are compared (below {REACHED:.0%} at β = {beta:g})",
        all(gain_at(table[kind, DPO]).high < REACHED for kind in PAIRS),
        "; ".join(f"{kind} {percent(gain_at(table[kind, DPO]))}" for kind in PAIRS),
    )
    worse = sum(outcome.gains[-1] < 0 for outcome in table["skewed", DPO])
    yield Claim(
        "With skewed pairs, DPO ends below the reference it started from, in some worlds",
        worse > 0,
        f"in {worse} of {params.worlds} worlds",
    )
    yield _sketch_claim(params, results)


def _sketch_claim(params: MisspecificationParams, results: Results) -> Claim:
    exact = gain_at(results.tabular[SKETCHED, AUX]).value
    found = {name: [gain_at(results.sketched[name, k]).value for k in params.sketches] for name in (TENSOR, GAUSSIAN)}
    rising = all(b > a - NEAR for gains in found.values() for a, b in pairwise(gains))
    return Claim(
        "The sketched constraint approaches the exact one as k grows",
        rising and all(abs(gains[-1] - exact) < NEAR for gains in found.values()),
        "; ".join(
            f"{name} {gains[0]:.1%} at k = {params.sketches[0]}, {gains[-1]:.1%} at {params.sketches[-1]:,}"
            for name, gains in found.items()
        )
        + f"; exact {exact:.1%}",
    )


def own_claims(params: MisspecificationParams, results: Results) -> Iterator[Claim]:
    table, data = results.tabular, results.data
    beside = [(kind, gain_at(table[kind, BY_SIDES])) for kind in PAIRS]
    yield Claim(
        "Weighting responses by the sides of pairs in which they stand leaves the policy undetermined",
        all(abs(gain.value) < NEAR for _, gain in beside),
        "gain of the policy closest to the reference among those that fit: "
        + "; ".join(f"{kind} {percent(gain)}" for kind, gain in beside),
    )
    apart = max(
        abs(a.gains[-1] - b.gains[-1])
        for kind in PAIRS
        for a, b in zip(table[kind, AUX], table[kind, RIDGE], strict=True)
    )
    yield Claim(
        "A small ridge on the offsets and no constraint at all gives AuxDPO's policy",
        apart < NEAR,
        f"gains at most {apart:.4f} apart at β = {params.betas[-1]:g}",
    )
    kinds = sorted({kind for kind, _ in data})
    yield Claim(
        "On a data set of drawn responses, too, the constraint alone leaves the policy undetermined",
        all(abs(gain_at(data[kind, AUX]).value) < NEAR for kind in kinds),
        "; ".join(f"{kind} {percent(gain_at(data[kind, AUX]))}" for kind in kinds),
    )
    yield Claim(
        "There, a ridge or gradients centred by prompt make it AuxDPO again, ahead of DPO with skewed pairs",
        all(gain_at(data["skewed", m]).low > gain_at(data["skewed", DPO]).high for m in (CENTRED, BOTH, RIDGE)),
        "; ".join(f"{m} {percent(gain_at(data['skewed', m]))}" for m in (DPO, CENTRED, BOTH, RIDGE)),
    )
