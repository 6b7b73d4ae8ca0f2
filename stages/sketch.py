"""The `sketch` stage."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stages.options import params_options, path_option

if TYPE_CHECKING:
    from pipeline.params import Params


@click.command("sketch")
@path_option("--pairs", "Prepared pairs and responses (from prepare).")
@path_option("--model", "The reference: a transformers folder (from sft).")
@path_option("--out", "Folder of sketches to write.")
@path_option("--metrics", "JSON file for rows, tokens/s and gradient norms.")
@params_options
def command(params: "Params", pairs: Path, model: Path, out: Path, metrics: Path) -> None:
    """Sketch the reference's gradient of every training response over the parameters that `trainable` names.

    Only responses that were not sketched before are sketched; a killed run goes on where it was. The sketches are
    written as Parquet with everything that determines them. With sketch.mode none, the default, the folder says that
    there are none. With sketch.source engine they are of the output head alone, and `score` has taken them on its way.

    \b
    Example:
      refcache sketch --pairs data/prepared/pairs --model models/reference --out data/reference/sketches \\
        --metrics results/sketch/metrics.json --set sketch.mode=tensorsketch
    """
    from pipeline.reference.sketching import sketch_responses

    summary = sketch_responses(
        pairs=pairs,
        model=model,
        out=out,
        metrics=metrics,
        params=params.sketch,
        trainable=params.trainable,
        score=params.score,
        trust_remote_code=params.model.trust_remote_code,
    )
    click.echo(_line(summary))


def _line(summary: dict[str, Any]) -> str:
    if summary["mode"] == "none":
        return "sketch: none (sketch.mode is none)"
    speed = f" at {summary['tokens_per_second']:,.0f} tokens/s" if summary["rows_sketched"] else ""
    return (
        f"sketch: {summary['rows_sketched']:,} rows sketched{speed}, {summary['rows_reused']:,} reused; "
        f"{summary['numbers_per_row']:,} numbers a row, {summary['bytes_per_row']:,.0f} bytes stored"
    )
