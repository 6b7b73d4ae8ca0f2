"""docs/studies/sweeps.md and its figure, from the run alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stages.options import params_options, path_option

if TYPE_CHECKING:
    from pipeline.params import Params
    from studies.pages.runs import Cells
    from studies.sweeps.claims import Setting

METRICS = {
    "accuracy": "reward accuracy (share of pairs)",
    "margin": "reward margin",
    "dcr": "dcr (share of pairs)",
}


@click.command()
@path_option("--run", "Folder of the study's outputs.")
@path_option("--page", "Markdown page to write.")
@path_option("--figure", "SVG to write.")
@params_options
def command(params: "Params", run: Path, page: Path, figure: Path) -> None:
    """Write the sweep's table, figure and cost."""
    import polars as pl

    from studies.pages.markdown import claims_table, write_page
    from studies.pages.runs import Cells, with_rewards
    from studies.pages.svg import write_svg
    from studies.sweeps.claims import judge, settings

    cells = Cells(with_rewards(pl.read_parquet(run / "pair_logps.parquet"), params), "test")
    sweep = settings(params)
    claims = judge(cells, sweep)
    write_svg(panels(cells, sweep), figure)
    write_page(
        page,
        introduction(params, run, cells),
        "## Held-out figures\n\nMean over pairs and seeds, ± half of two 95 % intervals: over the seeds, for these "
        "very pairs (what another batch order would change), and over the held-out prompts, for these very policies "
        "(what other data would change).",
        metrics_table(cells, sweep),
        f"![Accuracy, margin and dcr over mixture and alpha]({figure.name})\n\nBars: 95 % intervals over the seeds.",
        "## What was expected\n\nOf the papers and of the objectives' definitions. A difference counts if its 95 % "
        "interval over prompts leaves out zero.",
        claims_table(claims),
        cost_section(params, run),
    )
    for claim in claims:
        click.echo(f"{'true ' if claim.holds else 'false'} {claim.text}: {claim.evidence}")


def introduction(params: "Params", run: Path, cells: "Cells") -> str:
    import numpy as np

    from studies.pages.runs import REFERENCE, describe_sizes, read_json

    summary = read_json(run / "prepared" / "summary.json")
    drift = [np.abs(cells.by_pair(REFERENCE, f"{side}_ratio")[0]).max() for side in ("chosen", "rejected")]
    n_cells = len(params.sweep.variants) * len(params.sweep.seeds)
    return "\n".join(
        [
            "# Sweeps of BDPO's mixture and BPO's alpha on GSM8K pairs",
            "",
            f"Written by `dvc repro studies/sweeps/dvc.yaml` from its run: {n_cells} policies from one scoring pass. "
            "Far smaller than the papers' runs: what is so here is so for a model and data of this size.",
            "",
            *describe_sizes(params, summary, run / "reference"),
            "- held-out log-probs by one forward of each policy in transformers (`studies/measure/pair_logps.py`) "
            "against the reference cache, from which the reference's own forward differs by at most "
            f"{max(drift):.2g} nats a response",
        ]
    )


def metrics_table(cells: "Cells", sweep: "Sequence[Setting]") -> str:
    from studies.pages.markdown import markdown_table
    from studies.sweeps.claims import SERIES

    rows = []
    for setting in sweep:
        row = [SERIES[setting.series], f"{setting.value:g}"]
        for metric in METRICS:
            seeds, prompts = cells.over_seeds(setting.variant, metric), cells.over_prompts(setting.variant, metric)
            row.append(f"{seeds.show(3)} ± {prompts.half:.3f}")
        rows.append(row)
    columns = ["", "value", *(f"{title}: ± seeds ± prompts" for title in METRICS.values())]
    return markdown_table(columns, rows)


def panels(cells: "Cells", sweep: "Sequence[Setting]") -> dict[str, Any]:
    """The Vega-Lite spec: a panel per metric, a line per objective and link."""
    from studies.sweeps.claims import SERIES

    rows = []
    for setting in sweep:
        for metric in METRICS:
            mean = cells.over_seeds(setting.variant, metric)
            rows.append(
                {
                    "series": SERIES[setting.series],
                    "x": setting.value,
                    "metric": metric,
                    "mean": mean.value,
                    "low": mean.low,
                    "high": mean.high,
                }
            )
    x = {"field": "x", "type": "quantitative", "title": "mixture or alpha"}
    colour = {"field": "series", "type": "nominal", "sort": list(SERIES.values()), "title": None}
    y = {"type": "quantitative", "title": None, "scale": {"zero": False}}
    concat = [
        {
            "title": title,
            "width": 220,
            "height": 180,
            "transform": [{"filter": f"datum.metric == '{metric}'"}],
            "encoding": {"x": x, "color": colour},
            "layer": [
                {"mark": {"type": "line", "point": True}, "encoding": {"y": {"field": "mean", **y}}},
                {"mark": "rule", "encoding": {"y": {"field": "low", **y}, "y2": {"field": "high"}}},
            ],
        }
        for metric, title in METRICS.items()
    ]
    return {"data": {"values": rows}, "hconcat": concat}


def cost_section(params: "Params", run: Path) -> str:
    from studies.pages.markdown import markdown_table
    from studies.pages.runs import describe_times, read_json, sweep_totals

    found = read_json(run / "cost.json")
    names = [f"{name}-{seed}" for name in params.sweep.variants for seed in params.sweep.seeds]
    whole = sweep_totals(found, len(names))
    titles = {
        "cached": "with the reference cache: scored once",
        "anew": "`score` anew for every cell",
        "online": "no cache: the reference forwarded on every batch while training",
    }
    rows = [
        [
            title,
            *(f"{whole[name][kind]:,.0f}" for kind in ("wall", "cpu")),
            f"{whole[name]['wall'] / whole['cached']['wall']:.2f} ×",
        ]
        for name, title in titles.items()
    ]
    train, score, online = found["train"], found["score"], found["online"]
    return (
        "## What the sweep costs\n\n"
        f"Measured on one cell (`{found['cell']}`), each stage as its own process from an empty work folder: `train` "
        f"{train['wall']:.1f} s ({train['cpu']:.1f} s of CPU), `score` {score['wall']:.1f} s ({score['cpu']:.1f} s) "
        f"for {score['rows']:,} responses, the reference's forwards on the cell's own batches {online['wall']:.1f} s "
        f"({online['cpu']:.1f} s). For all {len(names)} cells:\n\n"
        + markdown_table(["", "seconds", "seconds of CPU", "against the cache"], rows)
        + "\n\nThe last line counts the forwards alone. It is the smaller gain that a cache brings where each cell "
        f"sees {params.train.epochs:g} epochs; it grows with the epochs, and the cache's one pass does not.\n\n"
        f"As the sweep itself ran, inside the stages: {describe_times(run, names)}. The whole study's time is in "
        "[README.md](README.md). At the papers' own sizes, on one GPU: `cp "
        "presets/study-sweeps-qwen2.5-0.5b-one-gpu.yaml studies/sweeps/params.yaml`, then the same command."
    )


if __name__ == "__main__":
    command()
