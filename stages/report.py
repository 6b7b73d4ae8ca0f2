"""`refcache report`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from stages.options import params_options, path_option

if TYPE_CHECKING:
    from pipeline.params import Params


@click.command("report")
@path_option("--prepared", "prepare's summary.json.")
@path_option("--sft", "Metrics of sft.")
@path_option("--score", "Metrics of score.")
@path_option("--results", "Folder with <cell>/history.tsv, <cell>/train.json, evaluate/<cell>.json, answers/<cell>/.")
@path_option("--out", "Folder for summary.json, curves.tsv, table.md, table.tex and index.html.")
@params_options
def command(params: "Params", prepared: Path, sft: Path, score: Path, results: Path, out: Path) -> None:
    """Collect all cells of the sweep into summary.json, curves.tsv and one page that opens offline.

    Where the evaluations hold tasks, suites or sampled answers, the page shows them; table.md and table.tex are the
    results to paste into a paper.

    \b
    Example:
      refcache report --prepared data/prepared/summary.json --sft results/sft/metrics.json \\
        --score results/score/metrics.json --results results --out report
    """
    from pipeline.report.collect import write_report

    train = params.train.model_dump(exclude={"variants"})
    trainable = params.trainable if isinstance(params.trainable, str) else params.trainable.model_dump()
    page = write_report(
        prepared=prepared,
        sft=sft,
        score=score,
        results=results,
        out=out,
        variants=params.sweep.variants,
        seeds=params.sweep.seeds,
        settings={"trainable": trainable, **train},
        overrides={name: params.train.variants[name].settings for name in params.sweep.variants},
    )
    cells = len(params.sweep.variants) * len(params.sweep.seeds)
    click.echo(f"report: {cells} {'policy' if cells == 1 else 'policies'} in {page}")
