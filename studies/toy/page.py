"""The page of the toy: tables, figure and claims, all computed from the runs."""

from pathlib import Path

from torch import Tensor

from studies.pages.markdown import claims_table, markdown_table, write_page
from studies.pages.svg import Spec, write_svg
from studies.toy.claims import MOVED, Change, Runs, change, moves_out, own_claims, papers_claims
from studies.toy.networks import ToyParams

ROLES = ("chosen", "rejected", "out of distribution")
COLOURS = ("#2f9e77", "#c0504d", "#4878d0")

INTRODUCTION = """
# The toy: where does the mass go?

Written by `dvc repro studies/dvc.yaml:toy`; edit `studies/toy/page.py`, not this page.

After the toy of the BDPO paper (arXiv 2506.12725): four prompts, four responses, one pair for each prompt, and so two
responses out of distribution. The policy is a two-layer network of {hidden} units. The paper's text was not at hand:
four prompts, four responses, two layers and {hidden} units are its, as we know them; all else is ours, so it is varied
below. {seeds} seeds of the initial weights, {steps} full-batch steps in float64; figures are means over prompts, then
mean ± standard deviation over seeds.

| setting | prompts | responses | reference: chosen, rejected, the two others | optimizer |
| --- | --- | --- | --- | --- |
{settings}

Prompts are orthogonal (`one_hot`) or have a cosine of 0.8 (`similar`). Responses: `two` means that two of the four are
in no pair at all; `all` that each prompt's other two are in other prompts' pairs. The network is first fitted to the
reference's probabilities by cross-entropy ({fit_steps} steps of Adam).
"""

SUMMARY = """
## Mass out of distribution

Change of the probability of both responses out of distribution together, from the reference: at the end, and in
brackets the largest rise on the way (of the drawn steps; mean over seeds of each seed's largest). Bold: a rise of
more than {moved} whose 95 % interval over the seeds excludes 0.
"""

FIGURE = """
![Trajectories]({figure})

Mean over prompts and seeds; bands are ± one standard deviation over seeds. Steps on a logarithmic axis.
"""


def write(params: ToyParams, runs: Runs, page: Path, figure: Path) -> None:
    write_svg(spec(params, runs), figure)
    settings = [
        f"| {name} | {x.prompts} | {x.responses} | "
        f"{', '.join(map(str, x.reference)) if x.reference else 'as initialised'} | {x.optimizer}, "
        f"{params.learning_rate[x.optimizer]:g} |"
        for name, x in params.settings.items()
    ]
    sizes = params.model_dump(include={"hidden", "seeds", "steps", "fit_steps"})
    write_page(
        page,
        INTRODUCTION.format(settings="\n".join(settings), **sizes),
        SUMMARY.format(moved=MOVED),
        summary_table(params, runs),
        FIGURE.format(figure=figure.name),
        "## The papers' claims, checked",
        claims_table(papers_claims(params, runs)),
        "## Expectations of ours, checked",
        claims_table(own_claims(params, runs)),
        *(f"## {name}\n\n{setting_table(params, runs, name)}" for name in params.settings),
        "`lowest chosen / reference`: the smallest π(chosen) / π_ref(chosen) of any prompt, seed and step.",
    )


def summary_table(params: ToyParams, runs: Runs) -> str:
    changes = {key: change(run) for key, run in runs.items()}
    rows = [
        [objective, *(_change(changes[setting, objective]) for setting in params.settings)]
        for objective in params.objectives
    ]
    return markdown_table(["objective", *params.settings], rows)


def _change(x: Change) -> str:
    text = f"{x.end:+.3f} ({x.rise:+.3f})"
    return f"**{text}**" if moves_out(x) else text


def setting_table(params: ToyParams, runs: Runs, setting: str) -> str:
    reference = runs[setting, next(iter(params.objectives))].trajectory[0]
    rows = [["(reference)", *_moments(reference), ""]]
    for objective in params.objectives:
        run = runs[setting, objective]
        rows.append([objective, *_moments(run.trajectory[-1]), f"{run.lowest_chosen_ratio.min().item():.3f}"])
    return markdown_table(["objective", *ROLES, "lowest chosen / reference"], rows)


def _moments(values: Tensor) -> list[str]:
    """values: (seeds, 3)."""
    return [f"{m:.3f} ± {s:.3f}" for m, s in zip(values.mean(dim=0).tolist(), values.std(dim=0).tolist(), strict=True)]


# figure ---------------------------------------------------------------------------------------------------------------


def spec(params: ToyParams, runs: Runs) -> Spec:
    rows = []
    for setting in params.settings:
        for objective in params.drawn:
            run = runs[setting, objective]
            mean, spread = run.trajectory.mean(dim=1), run.trajectory.std(dim=1)
            for step, means, spreads in zip(run.steps, mean.tolist(), spread.tolist(), strict=True):
                for role, m, s in zip(ROLES, means, spreads, strict=True):
                    row = {"setting": setting, "objective": objective, "step": step + 1, "role": role}
                    rows.append(row | {"mean": m, "low": max(0.0, m - s), "high": min(1.0, m + s)})
    ticks = {"values": [1, 10, 100, 1000], "grid": False}
    log = {"type": "log", "domain": [1, params.steps + 1], "nice": False}
    x = {"field": "step", "type": "quantitative", "title": "step + 1", "scale": log, "axis": ticks}
    halves = {"values": [0, 0.5, 1], "grid": False}
    y = {"type": "quantitative", "title": None, "scale": {"domain": [0, 1]}, "axis": halves}
    scale = {"domain": list(ROLES), "range": list(COLOURS)}
    colour = {"field": "role", "type": "nominal", "title": None, "scale": scale, "legend": {"orient": "top"}}
    band = {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "color": colour}
    facet = {"type": "nominal", "title": None}
    labels = {"labelAngle": 0, "labelAlign": "left", "labelOrient": "left"}
    return {
        "data": {"values": rows},
        "facet": {
            "row": {**facet, "field": "objective", "sort": params.drawn, "header": labels},
            "column": {**facet, "field": "setting", "sort": list(params.settings)},
        },
        "spacing": 12,
        "spec": {
            "view": {"stroke": "#ddd"},
            "width": 105,
            "height": 62,
            "layer": [
                {"mark": {"type": "area", "opacity": 0.25}, "encoding": band},
                {
                    "mark": {"type": "line", "strokeWidth": 1.5},
                    "encoding": {"x": x, "y": {**y, "field": "mean"}, "color": colour},
                },
            ],
        },
    }
