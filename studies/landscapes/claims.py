"""What the surveys of the landscapes say to the papers' claims, and to expectations of our own."""

from collections.abc import Iterator, Mapping
from itertools import pairwise

from studies.landscapes.survey import Landscape, LandscapeParams
from studies.pages.markdown import Claim


def papers_claims(params: LandscapeParams, surveys: Mapping[str, Landscape]) -> list[Claim]:
    dpo, bdpo, bpo = surveys["DPO"], surveys["BDPO"], surveys["BPO"]
    kept = Claim(
        "BPO never takes a point with less π(chosen) than the reference's for better",
        bpo.better_with_less == 0 and abs(bpo.lowest_chosen - params.reference.chosen) < 1e-6,
        f"{bpo.better_with_less:.2%} of the simplex; lowest π(chosen) {bpo.lowest_chosen:.3f}",
    )
    return [*margin_claims(params, dpo, bdpo), kept]


def own_claims(params: LandscapeParams, surveys: Mapping[str, Landscape]) -> list[Claim]:
    return [*remedy_claims(params, surveys), *descent_claims(surveys)]


def margin_claims(params: LandscapeParams, dpo: Landscape, bdpo: Landscape) -> Iterator[Claim]:
    ref_w = params.reference.chosen
    abandoned = f"({ref_w / 10:g}, 0)"
    yield Claim(
        "DPO's loss reaches its infimum wherever the rejected response is gone, whatever the chosen one keeps",
        dpo.abandoned - dpo.best < 1e-9 and dpo.lowest_chosen == 0,
        f"{dpo.best:.1e} at (1, 0), {dpo.abandoned:.1e} at {abandoned}",
    )
    corner = max(abs(bdpo.minimum[0] - 1), abs(bdpo.minimum[1]))
    yield Claim(
        "BDPO's minimum is at (1, 0), not all along an edge",
        bdpo.abandoned - bdpo.best > 1e-9 and corner < 2 / params.grid,
        f"{bdpo.best:.3f} at (1, 0), {bdpo.abandoned:.3f} at {abandoned}; "
        f"smallest on the grid at ({bdpo.minimum[0]:.4f}, {bdpo.minimum[1]:.4f})",
    )
    floor = (1 - params.objectives["BDPO"].hyperparameters()["mixture"]) * ref_w
    yield Claim(
        "BDPO beats the reference's loss only above (1 - mixture) π_ref(chosen)",
        abs(bdpo.lowest_chosen - floor) < 1e-6,
        f"{bdpo.lowest_chosen:.4f} measured, {floor:.4f} by the formula",
    )
    steep = {"DPO": dpo.rejected_slope, "BDPO": bdpo.rejected_slope}
    yield Claim(
        "DPO's slope in π(rejected) grows without bound as it goes to 0, BDPO's does not",
        steep["DPO"][1] > 100 * steep["DPO"][0] and steep["BDPO"][1] < 1.01 * steep["BDPO"][0],
        "; ".join(f"{name} {near:.3g} → {nearer:.3g}" for name, (near, nearer) in steep.items()),
    )


def remedy_claims(params: LandscapeParams, surveys: Mapping[str, Landscape]) -> Iterator[Claim]:
    dpo, dpop, bdpo = (surveys[name] for name in ("DPO", "DPOP", "BDPO"))
    yield Claim(
        "DPOP's penalty gives π(chosen) a floor, as BDPO has one",
        dpop.lowest_chosen > 0,
        f"lowest π(chosen): {probability(dpop.lowest_chosen)}, DPO's: {probability(dpo.lowest_chosen)}; "
        f"better with less: {dpop.better_with_less:.2%} of the simplex, under DPO {dpo.better_with_less:.2%}",
    )
    lowest = {
        variant.hyperparameters()["weight"]: surveys[name].lowest_chosen
        for name, variant in params.objectives.items()
        if variant.objective == "dpo_nll"
    }
    equal = [f". As BDPO at weight {w:g}" for w, p in lowest.items() if abs(p - bdpo.lowest_chosen) < 1e-3]
    yield Claim(
        "DPO+NLL holds the chosen response only as well as its weight is chosen",
        all(lowest[light] < lowest[heavy] for light, heavy in pairwise(sorted(lowest))),
        "; ".join(f"weight {w:g}: {probability(lowest[w])}" for w in sorted(lowest)) + "".join(equal),
    )


def descent_claims(surveys: Mapping[str, Landscape]) -> Iterator[Claim]:
    dpo = surveys["DPO"]
    falling = [f"{name} {x.chosen_falls:.1%}" for name, x in surveys.items() if x.chosen_falls > 0]
    yield Claim(
        "Descent on these landscapes lowers π(chosen) under DPO",
        dpo.chosen_falls > 0,
        f"DPO: {dpo.chosen_falls:.1%} of the simplex; any: {', '.join(falling) or 'none'}",
    )
    for name in ("BDPO", "BPO"):
        share = surveys[name].others_rise
        yield Claim(
            f"Descent under {name} moves less mass to the other responses than under DPO",
            share < dpo.others_rise,
            f"others rise on {share:.1%} of the simplex, under DPO on {dpo.others_rise:.1%}",
        )


def probability(p: float) -> str:
    if p == 0:
        return "none"
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"
