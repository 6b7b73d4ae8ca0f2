"""The page of the landscapes. Whatever it asserts is computed from the surveys; the text only says what was asked."""

from collections.abc import Mapping
from pathlib import Path

from studies.landscapes.claims import own_claims, papers_claims, probability
from studies.landscapes.figure import spec
from studies.landscapes.survey import Landscape, LandscapeParams
from studies.pages.markdown import claims_table, markdown_table, write_page
from studies.pages.svg import write_svg

INTRODUCTION = """
# Loss landscapes

Written by `dvc repro studies/dvc.yaml:landscapes`; edit `studies/landscapes/page.py`, not this page.

One prompt, a chosen response, a rejected one, and others that share what is left: π(chosen) + π(rejected) ≤ 1. The
question of the BDPO paper's figures 1 and 2 (arXiv 2506.12725): where does a loss lead once the policy may go anywhere?
π_ref(chosen) = {chosen} and π_ref(rejected) = {rejected} are the paper's. Ours are: β = 0.1, the weights of the NLL, a
penalty of 50 for DPOP. The papers' texts were not at hand; their claims below are as we know them. Losses and
gradients are `pipeline/objectives`'s own, in float64; shares are of {cells:,} points, a grid of {grid} × {grid} over
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
            probability(x.lowest_chosen),
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
        "## The papers' claims, checked",
        claims_table(papers_claims(params, surveys)),
        "## Expectations of ours, checked",
        claims_table(own_claims(params, surveys)),
    )
