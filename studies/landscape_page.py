"""The page of the landscapes. Whatever it asserts is computed from the surveys; the text only says what was asked."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from studies.figures import write_svg
from studies.landscape_figure import spec
from studies.landscapes import Landscape, LandscapeParams
from studies.tables import Claim, claims_table, markdown_table, write_page

INTRODUCTION = """
# Loss landscapes

Written by `dvc repro studies/dvc.yaml:landscapes`; edit `studies/landscape_page.py`, not this page.

One prompt, a chosen response, a rejected one, and others that share what is left: π(chosen) + π(rejected) ≤ 1. The
question of the BDPO paper's figures 1 and 2 (arXiv 2506.12725): where does a loss lead once the policy may go anywhere?
π_ref(chosen) = {chosen} and π_ref(rejected) = {rejected} are the paper's. Ours are: β = 0.1, the weights of the NLL, a
penalty of 50 for DPOP. The paper's text was not at hand; the claims below are its claims as we know them. Losses and
gradients are `pipeline/objectives.py`'s own, in float64; shares are of {cells:,} points, a grid of {grid} × {grid} over
the unit square. Each response is one token.
"""

FIGURE = """
![Loss landscapes]({figure})

Each panel is cut into ten parts of equal area by its loss, darkest where it is smallest, so that shapes compare
although losses don't. The cross is the reference. Red: from a dot, the direction of gradient descent on the three
logits of a table (chosen, rejected, others).
"""

TABLE = """
- **(1, 0)**, **(0.04, 0)**: the loss where the chosen response has everything, and where it has a tenth of the
  reference's while the rejected one has nothing (log π = -5,000). Equal: the loss does not care.
- **lowest π(chosen)**: the infimum over all points that beat the reference's own loss. None: a small enough
  π(rejected) pays for any fall.
- **better with less**: share of the simplex that beats the reference's loss with π(chosen) below the reference's.
- **chosen falls**, **others rise**: share where descent on a table's logits lowers π(chosen), or raises the others.
- **slope**: ∂loss/∂π(rejected) at π(rejected) = 10⁻⁴ and 10⁻⁸, π(chosen) as the reference's.
"""


def write(params: LandscapeParams, surveys: Mapping[str, Landscape], page: Path, figure: Path) -> None:
    write_svg(spec(params), figure)
    columns = ("objective", "start", "(1, 0)", "(0.04, 0)", "lowest π(chosen)", "better with less")
    rows = [
        (
            name,
            f"{x.start:.3f}",
            f"{x.best:.3f}",
            f"{x.abandoned:.3f}",
            _probability(x.lowest_chosen),
            f"{x.better_with_less:.2%}",
            f"{x.chosen_falls:.1%}",
            f"{x.others_rise:.1%}",
            " → ".join(f"{slope + 0.0:.3g}" for slope in x.rejected_slope),
        )
        for name, x in surveys.items()
    ]
    points = params.grid * (params.grid - 1) // 2
    reference = params.reference
    write_page(
        page,
        INTRODUCTION.format(chosen=reference.chosen, rejected=reference.rejected, cells=points, grid=params.grid),
        FIGURE.format(figure=figure.name),
        markdown_table((*columns, "chosen falls", "others rise", "slope"), rows),
        TABLE,
        "## Claims, checked",
        claims_table(claims(params, surveys)),
    )


def claims(params: LandscapeParams, surveys: Mapping[str, Landscape]) -> list[Claim]:
    dpo, dpop, bdpo, bpo = (surveys[name] for name in ("DPO", "DPOP", "BDPO", "BPO"))
    ref_w = params.reference.chosen
    mixture = params.objectives["BDPO"].hyperparameters()["mixture"]
    nll = {v.hyperparameters()["weight"]: surveys[name] for name, v in params.objectives.items() if "NLL" in name}
    equal = [weight for weight, x in nll.items() if abs(x.lowest_chosen - bdpo.lowest_chosen) < 1e-3]
    corner = max(abs(bdpo.minimum[0] - 1), abs(bdpo.minimum[1]))
    falling = {name: x.chosen_falls for name, x in surveys.items() if x.chosen_falls > 0}
    steep = {name: x.rejected_slope for name, x in (("DPO", dpo), ("BDPO", bdpo))}
    return [
        Claim(
            "DPO's loss reaches its infimum wherever the rejected response is gone, whatever the chosen one keeps",
            dpo.abandoned - dpo.best < 1e-9 and dpo.lowest_chosen == 0,
            f"{dpo.best:.1e} at (1, 0), {dpo.abandoned:.1e} at ({ref_w / 10:g}, 0)",
        ),
        Claim(
            "BDPO's minimum is at (1, 0), not all along an edge",
            bdpo.abandoned > bdpo.best and corner < 2 / params.grid,
            f"{bdpo.best:.3f} at (1, 0), {bdpo.abandoned:.3f} at ({ref_w / 10:g}, 0); "
            f"smallest on the grid at ({bdpo.minimum[0]:.4f}, {bdpo.minimum[1]:.4f})",
        ),
        Claim(
            "BDPO beats the reference's loss only above (1 - mixture) π_ref(chosen)",
            abs(bdpo.lowest_chosen - (1 - mixture) * ref_w) < 1e-6,
            f"{bdpo.lowest_chosen:.4f} measured, {(1 - mixture) * ref_w:.4f} by the formula",
        ),
        Claim(
            "DPO's slope in π(rejected) grows without bound as it goes to 0, BDPO's does not",
            steep["DPO"][1] > 100 * steep["DPO"][0] and steep["BDPO"][1] < 1.01 * steep["BDPO"][0],
            "; ".join(f"{name} {near:.3g} → {nearer:.3g}" for name, (near, nearer) in steep.items()),
        ),
        Claim(
            "DPOP's penalty ends that: no point beats the reference with the chosen response far below it",
            dpop.lowest_chosen > 0,
            f"lowest π(chosen): {_probability(dpop.lowest_chosen)}, DPO's: {_probability(dpo.lowest_chosen)}; "
            f"better with less: {dpop.better_with_less:.2%} of the simplex, under DPO {dpo.better_with_less:.2%}",
        ),
        Claim(
            "DPO+NLL holds the chosen response only as well as its weight is chosen",
            all(nll[light].lowest_chosen < nll[heavy].lowest_chosen for light, heavy in pairwise(sorted(nll))),
            "; ".join(f"weight {w:g}: {_probability(x.lowest_chosen)}" for w, x in sorted(nll.items()))
            + (f". As BDPO at weight {equal[0]:g}" if equal else ""),
        ),
        Claim(
            "BPO never takes a point with less π(chosen) than the reference's for better",
            bpo.better_with_less == 0 and abs(bpo.lowest_chosen - ref_w) < 1e-6,
            f"{bpo.better_with_less:.2%} of the simplex; lowest π(chosen) {bpo.lowest_chosen:.3f}",
        ),
        Claim(
            "Descent on these landscapes lowers π(chosen) under DPO",
            dpo.chosen_falls > 0,
            f"DPO: {dpo.chosen_falls:.1%} of the simplex; any: "
            + (", ".join(f"{name} {share:.1%}" for name, share in falling.items()) or "none"),
        ),
        Claim(
            "Descent under BDPO moves less mass to the other responses than under DPO",
            bdpo.others_rise < dpo.others_rise,
            f"others rise on {bdpo.others_rise:.1%} of the simplex, under DPO on {dpo.others_rise:.1%}",
        ),
        Claim(
            "Descent under BPO moves less mass to the other responses than under DPO",
            bpo.others_rise < dpo.others_rise,
            f"others rise on {bpo.others_rise:.1%} of the simplex, under DPO on {dpo.others_rise:.1%}",
        ),
    ]


def _probability(p: float) -> str:
    if p == 0:
        return "none"
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"
