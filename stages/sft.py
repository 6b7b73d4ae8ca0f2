"""The `sft` stage."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from stages.options import params_options, path_option

if TYPE_CHECKING:
    from pipeline.params import Params


@click.command(name="sft")
@path_option("--sft", "Supervised rows from prepare (Parquet).")
@path_option("--tokenizer", "Tokenizer folder from prepare.")
@path_option("--out", "Reference model to write, a transformers folder.")
@path_option("--history", "Training history to write (TSV).")
@path_option("--metrics", "Metrics to write (JSON).")
@params_options
def command(params: "Params", sft: Path, tokenizer: Path, out: Path, history: Path, metrics: Path) -> None:
    """Fine-tune the reference model with DeepSpeed, or take it as it is (sft.epochs: 0).

    \b
    Example:
      refcache sft --sft data/prepared/sft.parquet --tokenizer data/prepared/tokenizer \\
        --out models/reference --history results/sft/history.tsv --metrics results/sft/metrics.json
    """
    from pipeline.report.numbers import show_trained
    from pipeline.runs.sft import fine_tune

    summary = fine_tune(
        sft=sft,
        tokenizer=tokenizer,
        out=out,
        history=history,
        metrics=metrics,
        params=params.sft,
        model=params.model,
    )
    if summary.get("steps"):  # none where the model is taken as it is, or another process is rank 0
        click.echo(f"sft: trained {show_trained(summary)}")
