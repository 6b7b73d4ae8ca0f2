"""`refcache prepare`: preference data -> sft rows, tokenizer, pairs and responses."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from stages.options import params_options, path_option

if TYPE_CHECKING:
    from pipeline.params import Params


@click.command()
@path_option("--sft", "Parquet file of supervised rows to write.")
@path_option("--tokenizer", "Tokenizer folder to write; replaced as a whole.")
@path_option("--pairs", "Folder to write pairs.parquet and responses.parquet to.")
@path_option("--summary", "JSON file of counts to write.")
@click.option(
    "--on-bad-row",
    type=click.Choice(["fail", "skip"]),
    help="Stop at bad rows, or leave them out and count them.  [default: prepare.on_bad_row]",
)
@params_options
def command(params: "Params", sft: Path, tokenizer: Path, pairs: Path, summary: Path, on_bad_row: str | None) -> None:
    """Read preference data; tokenise, split and key it.

    Reads the files of prepare.input, a hub dataset, or the generated demo. Adding pairs changes neither the supervised
    rows nor the tokenizer, so the reference and everything cached from it stay valid.

    \b
    Example:
      refcache prepare --sft data/prepared/sft.parquet --tokenizer data/prepared/tokenizer \\
        --pairs data/prepared/pairs --summary data/prepared/summary.json --on-bad-row skip
    """
    import os

    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # before pyarrow: its own keeps what was freed
    from pipeline.data.prepare import prepare_data

    counts = prepare_data(
        params.prepare,
        params.model,
        sft=sft,
        tokenizer=tokenizer,
        pairs=pairs,
        summary=summary,
        on_bad_row=on_bad_row,
    )
    feedback = counts["feedback"]["train"], counts["feedback"]["test"]
    rows = f", {feedback[0]:,} and {feedback[1]:,} rows of feedback" if any(feedback) else ""
    click.echo(
        f"{counts['pairs']['train']:,} train and {counts['pairs']['test']:,} test pairs over "
        f"{counts['prompts']['train']:,} and {counts['prompts']['test']:,} prompts, "
        f"{counts['distinct_responses']:,} distinct responses, {counts['sft_rows']:,} sft rows{rows}"
    )
