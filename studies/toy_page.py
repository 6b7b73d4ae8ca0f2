"""The page of the toy: tables, figure and claims, all computed from the runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from studies.figures import Spec, write_svg
from studies.tables import Claim, claims_table, markdown_table, write_page
from studies.toy import Run, ToyParams

Runs = Mapping[tuple[str, str], Run]

CHOSEN, REJECTED, OUTSIDE = range(3)
ROLES = ("chosen", "rejected", "out of distribution")
COLOURS = ("#2f9e77", "#c0504d", "#4878d0")
MOVED = 0.01  # a smaller change of probability is called none

INTRODUCTION = """
# The toy: where does the mass go?

Written by `dvc repro studies/dvc.yaml:toy`; edit `studies/toy_page.py`, not this page.

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
brackets the largest rise on the way (over the drawn steps; mean over seeds of each seed's largest). Bold: a rise of
more than {moved} whose 95 % interval over the seeds excludes 0.
"""

FIGURE = """
![Trajectories]({figure})

Mean over prompts and seeds; bands are ± one standard deviation over seeds. Steps on a logarithmic axis.
"""


@dataclass(frozen=True)
class Change:
    """How the mass out of distribution changed from the reference's, mean over seeds with 1.96 standard errors."""

    end: float
    end_error: float
    rise: float
    rise_error: float


def change(run: Run) -> Change:
    outside = run.trajectory[..., OUTSIDE] - run.trajectory[0, :, OUTSIDE]
    end, rise = outside[-1], outside.amax(dim=0)
    return Change(end.mean().item(), _error(end), rise.mean().item(), _error(rise))


def _error(values: Tensor) -> float:
    return 1.96 * values.std().item() / len(values) ** 0.5


def moves_out(x: Change) -> bool:
    """On the way at least, by more than MOVED and more than chance."""
    return x.rise > MOVED and x.rise - x.rise_error > 0


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
        "## Claims, checked",
        claims_table(claims(params, runs)),
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


# claims ---------------------------------------------------------------------------------------------------------------


def claims(params: ToyParams, runs: Runs) -> list[Claim]:
    changes = {key: change(run) for key, run in runs.items()}

    def where(objective: str, holds: Callable[[Change], bool]) -> list[str]:
        return [setting for setting in params.settings if holds(changes[setting, objective])]

    def ends_out(x: Change) -> bool:
        return x.end > MOVED and x.end - x.end_error > 0

    def lowest(objective: str) -> float:
        return min(runs[setting, objective].lowest_chosen_ratio.min().item() for setting in params.settings)

    # A fall, not the rounding of a policy that has not moved.
    fallen = {objective: lowest(objective) for objective in params.objectives if lowest(objective) < 0.999}
    ended = {objective: where(objective, ends_out) for objective in params.objectives}
    passing = {objective: where(objective, moves_out) for objective in params.objectives}
    floor = 1 - params.objectives["bdpo"].hyperparameters()["mixture"]
    more = [s for s in params.settings if changes[s, "bdpo"].rise > changes[s, "dpo"].rise + MOVED]
    rises = "; ".join(f"{s}: {changes[s, 'dpo'].rise:+.3f} and {changes[s, 'bdpo'].rise:+.3f}" for s in params.settings)
    return [
        Claim("DPO moves mass out of distribution on the way", bool(passing["dpo"]), _places(passing["dpo"], params)),
        Claim("DPO has moved mass out of distribution in the end", bool(ended["dpo"]), _places(ended["dpo"], params)),
        Claim(
            "BDPO moves no mass out of distribution, at any time", not passing["bdpo"], _places(passing["bdpo"], params)
        ),
        Claim("BDPO nowhere moves more out than DPO does", not more, f"largest rise of DPO and BDPO: {rises}"),
        Claim(
            "DPO lowers the chosen response, of some prompt at some time",
            "dpo" in fallen,
            f"lowest chosen / reference {lowest('dpo'):.3f}. Below 1: "
            + (", ".join(f"{name} {ratio:.3f}" for name, ratio in fallen.items()) or "no objective"),
        ),
        Claim(
            f"BDPO keeps π(chosen) ≥ {floor:g} π_ref(chosen) at every step",
            lowest("bdpo") >= floor,
            f"lowest chosen / reference {lowest('bdpo'):.3f}",
        ),
        Claim("BPO never lets the chosen reward fall below 0", lowest("bpo") >= 0.999, f"lowest {lowest('bpo'):.3f}"),
        Claim(
            "BPO moves no mass out of distribution, at any time", not passing["bpo"], _places(passing["bpo"], params)
        ),
        Claim(
            "No objective has moved mass out of distribution in the end",
            not any(ended.values()),
            "; ".join(f"{name}: {', '.join(places)}" for name, places in ended.items() if places) or "none",
        ),
        Claim(
            "Objectives with an NLL of the chosen response (dpo_nll, slic_nll, orpo, sft) never move mass out",
            not any(passing[name] for name in ("dpo_nll", "slic_nll", "orpo", "sft")),
            "; ".join(f"{n}: {_places(passing[n], params)}" for n in ("dpo_nll", "slic_nll", "orpo", "sft")),
        ),
    ]


def _places(settings: list[str], params: ToyParams) -> str:
    return f"in {len(settings)} of {len(params.settings)} settings" + (f" ({', '.join(settings)})" if settings else "")


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
