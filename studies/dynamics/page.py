"""docs/studies/dynamics.md and its figure, from the run alone."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stages.options import params_options, path_option

if TYPE_CHECKING:
    import polars as pl

    from pipeline.params import Params
    from studies.dynamics.claims import Divergences
    from studies.pages.runs import Cells

PANELS = {
    "chosen": "chosen log-prob less the reference's (nats)",
    "rejected": "rejected log-prob less the reference's (nats)",
    "in_distribution_logp": "in-distribution log-prob (nats)",
    "nll/chosen": "NLL of chosen (nats a token)",
    "dcr": "dcr (share of pairs)",
    "rewards/accuracies": "reward accuracy (share of pairs)",
}
POINTS = 60  # of a line in the figure


@click.command()
@path_option("--run", "Folder of the study's outputs.")
@path_option("--page", "Markdown page to write.")
@path_option("--figure", "SVG to write.")
@params_options
def command(params: "Params", run: Path, page: Path, figure: Path) -> None:
    """Judge the papers' claims by the run and write the page."""
    import polars as pl

    from studies.dynamics.claims import Divergences, judge
    from studies.pages.markdown import claims_table, write_page
    from studies.pages.runs import Cells, with_rewards
    from studies.pages.svg import write_svg

    values = with_rewards(pl.read_parquet(run / "pair_logps.parquet"), params)
    kl = pl.read_parquet(run / "divergence.parquet")
    splits = {name: (Cells(values, name), Divergences(kl, name)) for name in ("train", "test")}
    claims = [claim for name, (cells, divergences) in splits.items() for claim in judge(cells, divergences, name)]
    write_svg(learning_curves(params, run), figure)
    write_page(
        page,
        introduction(params, run),
        "## The papers' claims\n\nA claim is true here if its difference has the claimed sign and the 95 % interval "
        "over prompts (mean over seeds) leaves out zero.",
        claims_table(claims),
        "## At the end of training\n\nMean over seeds ± half the 95 % interval over prompts.",
        *(end_table(params, *splits[name], name) for name in splits),
        f"## While training\n\nOn the batches as they come, mean over one epoch and over seeds.\n\n"
        f"![Learning curves]({figure.name})",
        measured(params, splits["test"][0]),
        cost(params, run),
    )
    for claim in claims:
        click.echo(f"{'true ' if claim.holds else 'false'} {claim.text}: {claim.evidence}")


def introduction(params: "Params", run: Path) -> str:
    from studies.pages.runs import describe_sizes, read_json

    sizes = describe_sizes(params, read_json(run / "prepared" / "summary.json"), run / "reference")
    variants = [
        f"`{name}` ({', '.join(f'{key} {value}' for key, value in variant.hyperparameters().items())})"
        for name, variant in params.train.variants.items()
    ]
    return "\n".join(
        [
            "# Learning dynamics on UltraFeedback",
            "",
            "Written by `dvc repro studies/dynamics/dvc.yaml` from its run. Far smaller than the papers' runs: what "
            "is true or false here is so for a model and data of this size.",
            "",
            *sizes,
            f"- objectives: {'; '.join(variants)}",
        ]
    )


def end_table(params: "Params", cells: "Cells", divergences: "Divergences", split: str) -> str:
    import numpy as np

    from studies.dynamics.claims import SPLITS, nll
    from studies.pages.markdown import markdown_table
    from studies.pages.runs import REFERENCE

    def in_distribution(variant: str, prefix: str = "") -> float:
        sides = [cells.by_pair(variant, f"{prefix}{side}")[0] for side in ("chosen", "rejected")]
        return float(np.logaddexp(*sides).mean())

    columns = ["", "change in chosen (nats)", "change in rejected (nats)", "in-distribution log-prob (nats)"]
    columns += ["NLL of chosen (nats a token)", "KL to the reference (nats an answer)", "dcr", "reward accuracy"]
    first = f"{in_distribution(REFERENCE, 'ref_'):.1f}".replace("-", "−")
    rows = [["reference", "0", "0", first, f"{nll(cells, REFERENCE):.3f}", "0", "–", "–"]]
    for name in params.sweep.variants:
        rows.append(
            [
                name,
                *(cells.over_prompts(name, f"{side}_ratio").show(1) for side in ("chosen", "rejected")),
                f"{in_distribution(name):.1f}".replace("-", "−"),
                f"{nll(cells, name):.3f}",
                divergences.mean(name).show(),
                cells.over_prompts(name, "dcr").show(3),
                cells.over_prompts(name, "accuracy").show(3),
            ]
        )
    return f"On {SPLITS[split]}:\n\n{markdown_table(columns, rows)}"


def learning_curves(params: "Params", run: Path) -> dict[str, Any]:
    """The Vega-Lite spec: six panels, a line per objective."""
    rows = []
    for variant in params.sweep.variants:
        histories = [run / "cells" / f"{variant}-{seed}" / "history.tsv" for seed in params.sweep.seeds]
        rows += curve_points(histories, variant, params.train.variants[variant].reward_beta)
    wide = [
        {
            "title": title,
            "width": 250,
            "height": 150,
            "transform": [{"filter": f"datum.metric == '{metric}'"}],
            "mark": {"type": "line", "strokeWidth": 1.6},
            "encoding": {
                "x": {"field": "epoch", "type": "quantitative", "title": "epoch"},
                "y": {"field": "value", "type": "quantitative", "title": None, "scale": {"zero": False}},
                "color": {"field": "variant", "type": "nominal", "sort": params.sweep.variants, "title": None},
            },
        }
        for metric, title in PANELS.items()
    ]
    return {"data": {"values": rows}, "columns": 2, "concat": wide}


def curve_points(histories: list[Path], variant: str, beta: float) -> list[dict[str, Any]]:
    """Rows of epoch, metric, value: the mean over seeds of the mean over the last epoch's steps, thinned."""
    import polars as pl

    tables = [with_log_ratios(pl.read_csv(file, separator="\t"), beta) for file in histories]
    steps = tables[0].height
    per_epoch = max(1, round(steps / tables[0]["epoch"][-1]))
    mean = pl.concat(tables).group_by("step").agg(pl.col("epoch", *PANELS).mean()).sort("step")
    smooth = mean.with_columns(pl.col(*PANELS).rolling_mean(per_epoch, min_samples=1))
    thin = smooth.gather_every(max(1, steps // POINTS))
    return [
        {"variant": variant, "epoch": round(row["epoch"], 3), "metric": metric, "value": float(f"{row[metric]:.4g}")}
        for row in thin.iter_rows(named=True)
        for metric in PANELS
    ]


def with_log_ratios(history: "pl.DataFrame", beta: float) -> "pl.DataFrame":
    """history.tsv with `chosen` and `rejected`: log-ratios in nats, which vary less from batch to batch than logps."""
    import polars as pl

    return history.with_columns(*((pl.col(f"rewards/{side}") / beta).alias(side) for side in ("chosen", "rejected")))


def measured(params: "Params", cells: "Cells") -> str:
    """How the figures were taken; cells: the held-out pairs."""
    import numpy as np

    from studies.pages.runs import REFERENCE

    drift = [np.abs(cells.by_pair(REFERENCE, f"{side}_ratio")[0]).max() for side in ("chosen", "rejected")]
    return (
        "## How it was measured\n\n"
        "Log-probs by one forward of each policy in transformers (`studies/measure/pair_logps.py`) against the "
        f"reference cache, from which the reference's own forward differs by at most {max(drift):.2g} nats a held-out "
        f"response. KL(policy ‖ reference) at the end of training: {params.evaluate.samples_per_prompt} answers "
        f"drawn to each of up to {params.evaluate.prompts} prompts a split, cut at "
        f"{params.evaluate.max_new_tokens} tokens, the "
        "exact divergence of the next token summed along them (`studies/measure/divergence.py`)."
    )


def cost(params: "Params", run: Path) -> str:
    from studies.pages.runs import describe_times

    cells = [f"{name}-{seed}" for name in params.sweep.variants for seed in params.sweep.seeds]
    return (
        f"## Time\n\nInside the stages: {describe_times(run, cells)}. The whole study's time is in "
        "[README.md](README.md). At the papers' own sizes, on one GPU: `cp "
        "presets/study-dynamics-qwen2.5-0.5b-one-gpu.yaml studies/dynamics/params.yaml`, then the same command."
    )


if __name__ == "__main__":
    command()
