"""The page on misspecification: tables, figure and claims, all computed from the runs."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from studies.misspecification.claims import gain_at, own_claims, papers_claims, percent
from studies.misspecification.worlds import (
    AUX,
    DATA_METHODS,
    DPO,
    GAUSSIAN,
    METHODS,
    PAIRS,
    RIDGE,
    SKETCHED,
    TENSOR,
    MisspecificationParams,
    Outcome,
    Results,
)
from studies.pages.markdown import claims_table, markdown_table, write_page
from studies.pages.svg import Spec, write_svg

COLOURS = {DPO: "#c0504d", AUX: "#2f9e77", RIDGE: "#4878d0", TENSOR: "#2f9e77", GAUSSIAN: "#8a6fb5"}

INTRODUCTION = """
# Misspecification: a policy that can't represent the reward

Written by `dvc repro studies/dvc.yaml:misspecification`; edit `studies/misspecification/page.py`, not this page.

AuxDPO (arXiv 2510.20413) says that DPO is misspecified: where the policy can't represent the reward, what DPO ends at
depends on which pairs were compared, and AuxDPO ends at the KL-regularised optimum of the policy's class. The paper
shows it on a bandit of three responses; here is a contextual one, with a policy of {parameters} parameters for {total}
responses ({prompts} prompts, {responses} responses each).

π_θ(y | x) ∝ π_ref(y | x) exp⟨f(x, y) ⊗ h(x), θ⟩; features, the reference's logits and the rewards r are normal, so r
lies outside the class. Everything is an exact expectation: labels are the Bradley-Terry probabilities of r, and nothing
is sampled but the {worlds} worlds. Losses are `pipeline/objectives`'s, solved by Newton's method in float64; the
optimum maximises E[r] − β KL directly. Figures are means over worlds with 95 % intervals.

- **Pairs**: compared as two draws from the reference (`reference`), all alike (`uniform`), or with log-normal weights
  of spread {spread:g} (`skewed`).
- **AuxDPO**: offsets with Σ w δ g = 0, g the gradient of log π at the reference, w how often the reference gives the
  response. **by sides**: w the share of sides of pairs in which the response stands, as ‖(1/2n) Σ δ g‖² over a data
  set's pairs has it. **centred**: g without its mean over the prompt's responses.
- **ridge alone**: no constraint; {ridge:g} × Σ w δ².

Where several policies fit alike, the one closest to the reference is taken.
"""

GAINS = """
## How much of the optimum's gain

Of what the class's optimum gains over the reference in E[r] − β KL, the share that each policy gains. 100 %: the
optimum; 0: the reference; below 0: worse than not training.
"""

FIGURE = """
![Gain by beta and by k]({figure})

Left: by β, for each kind of pairs. Right: by the numbers k of a sketch of the constraint (β = {beta:g}, {kind} pairs);
a dense Gaussian sketch determines all {parameters} parameters from k = {parameters} on, TensorSketch when no two of
them share a bucket. Bands are 95 % intervals over worlds.
"""

SKETCHES = """
## Sketched constraints

Σ w δ S g = 0 for a sketch S g of k numbers, hashes as in `pipeline/sketches/hashes.py`; gains at β = {beta:g}.
"""

DATA = """
## A data set of drawn responses

{prompts} prompts of {responses} responses each, of which {drawn} are drawn from the reference as data; {parameters}
parameters; the rewards have a part in the class as well, {signal:g} times the size of the other. Pairs are those among
the drawn responses; gains are over all responses, at β = {beta:g}. Offsets that are the same for all responses of a
prompt change no margin. Summed over all that the reference says, they cancel in Σ w δ g; over a sample they don't, and
with more prompts than parameters they make up for anything: the constraint then says nothing.
"""

WHY = """
## Why a ridge is enough here

Move θ a little and the offsets so that no margin changes: at the least loss, the ridge must not change either, so
Σ w δ ∇log π_θ = 0, whatever the ridge's weight: AuxDPO's own condition, with gradients at the policy where the paper
has them at the reference. For this policy they are the same up to a constant a prompt, which the same argument
removes. A larger ridge also pulls the offsets off the labels. None of this says how fast either is found by a few
epochs of stochastic gradients, or what noise in the labels does.
"""


def write(params: MisspecificationParams, results: Results, page: Path, figure: Path) -> None:
    write_svg(spec(params, results), figure)
    beta, parameters = params.betas[-1], params.side**2
    sizes = params.model_dump(include={"prompts", "responses", "worlds", "spread", "ridge"})
    data = params.data.model_dump() | {"parameters": params.data.side**2}
    write_page(
        page,
        INTRODUCTION.format(parameters=parameters, total=params.prompts * params.responses, **sizes),
        GAINS,
        gains_table(params, results.tabular, METHODS),
        FIGURE.format(figure=figure.name, beta=beta, kind=SKETCHED, parameters=parameters),
        "## The paper's claims, checked",
        claims_table(papers_claims(params, results)),
        "## Findings of ours, checked",
        claims_table(own_claims(params, results)),
        SKETCHES.format(beta=beta),
        sketch_table(params, results),
        DATA.format(beta=beta, **data),
        data_table(results.data),
        WHY,
    )


def gains_table(
    params: MisspecificationParams, table: Mapping[tuple[str, str], list[Outcome]], methods: Sequence[str]
) -> str:
    rows = [
        (kind, method, *(percent(gain_at(table[kind, method], i)) for i in range(len(params.betas))))
        for kind in PAIRS
        for method in methods
    ]
    return markdown_table(["pairs", "method", *(f"β = {beta:g}" for beta in params.betas)], rows)


def sketch_table(params: MisspecificationParams, results: Results) -> str:
    rows = [
        (f"{k:,}", *(percent(gain_at(results.sketched[name, k])) for name in (TENSOR, GAUSSIAN)))
        for k in params.sketches
    ]
    return markdown_table(["k", TENSOR, GAUSSIAN], rows)


def data_table(table: Mapping[tuple[str, str], list[Outcome]]) -> str:
    kinds = list(dict.fromkeys(kind for kind, _ in table))
    return markdown_table(
        ["method", *kinds], [(m, *(percent(gain_at(table[kind, m])) for kind in kinds)) for m in DATA_METHODS]
    )


# figure ---------------------------------------------------------------------------------------------------------------


def spec(params: MisspecificationParams, results: Results) -> Spec:
    drawn = (DPO, AUX, RIDGE)
    by_beta = [
        {"pairs": kind, "method": method, "x": beta, **_ends(results.tabular[kind, method], i)}
        for kind in PAIRS
        for method in drawn
        for i, beta in enumerate(params.betas)
    ]
    by_k = [
        {"method": name, "x": k, **_ends(results.sketched[name, k], -1)}
        for name in (TENSOR, GAUSSIAN)
        for k in params.sketches
    ]
    left = {
        "data": {"values": by_beta},
        "facet": {"column": {"field": "pairs", "type": "nominal", "sort": list(PAIRS), "title": None}},
    }
    return {
        "hconcat": [
            left | {"spacing": 10, "spec": _panel("β", params.betas, drawn, 150)},
            {"data": {"values": by_k}, "title": "sketched", **_panel("k", params.sketches, (TENSOR, GAUSSIAN), 190)},
        ],
        "resolve": {"scale": {"color": "independent"}},
    }


def _ends(outcomes: list[Outcome], beta: int) -> dict[str, float]:
    mean = gain_at(outcomes, beta)
    return {"mean": mean.value, "low": mean.low, "high": mean.high}


def _panel(title: str, values: Sequence[float], methods: Sequence[str], width: int) -> Spec:
    axis = {"values": list(_thinned(values)), "grid": False}
    x = {"field": "x", "type": "quantitative", "title": title, "scale": {"type": "log", "nice": False}, "axis": axis}
    y = {"type": "quantitative", "title": "share of the optimum's gain", "axis": {"format": "%", "tickCount": 6}}
    scale = {"domain": list(methods), "range": [COLOURS[method] for method in methods]}
    colour = {"field": "method", "type": "nominal", "title": None, "scale": scale, "legend": {"orient": "bottom"}}
    dash = {"condition": {"test": f"datum.method == '{RIDGE}'", "value": [3, 3]}, "value": [1, 0]}
    return {
        "width": width,
        "height": 190,
        "layer": [
            {
                "mark": {"type": "area", "opacity": 0.2},
                "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "color": colour},
            },
            {
                "mark": {"type": "line", "strokeWidth": 2},
                "encoding": {"x": x, "y": {**y, "field": "mean"}, "color": colour, "strokeDash": dash},
            },
        ],
    }


def _thinned(values: Sequence[float]) -> Iterator[float]:
    """At most four of the values."""
    yield from values[:: -(-len(values) // 4)]
