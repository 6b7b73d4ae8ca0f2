"""The `sample` stage."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from stages.options import params_options, path_option

if TYPE_CHECKING:
    from pipeline.params import Params


@click.command("sample")
@path_option("--pairs", "Prepared pairs (from prepare): their train prompts, and the test split that is kept.")
@path_option("--model", "The reference, which answers: a transformers folder (from sft).")
@path_option("--tokenizer", "Tokenizer folder from prepare.")
@path_option("--out", "Folder for pairs/, answers.parquet, rows.jsonl and summary.json.")
@params_options
def command(params: "Params", pairs: Path, model: Path, tokenizer: Path, out: Path) -> None:
    """Make pairs of answers that the reference itself gives to the train prompts.

    sample.n answers a prompt by vLLM, each scored by sample.scorer, and paired by sample.pairs. Answers are kept as
    they come; a killed run goes on where it was. Train on them with `pairs: sampled`.

    \b
    Example:
      refcache sample --pairs data/prepared/pairs --model models/reference --tokenizer data/prepared/tokenizer \\
        --out data/sampled --set sample.scorer=math
    """
    from pipeline.sampled.sampling import sample_pairs

    found = sample_pairs(
        params=params.sample,
        prepare=params.prepare,
        engine=params.score,
        pairs=pairs,
        model=model,
        tokenizer=tokenizer,
        out=out,
        trust_remote_code=params.model.trust_remote_code,
    )
    if found["scorer"] == "none":
        click.echo("sample: off (sample.scorer: none)")
        return
    click.echo(
        f"sample: {found['pairs']:,} pairs from {found['answers']:,} answers to {found['prompts']:,} prompts; "
        f"{found['prompts_all_alike']:,} prompts without a pair, {found['answers_cut']:,} answers cut, "
        f"{found['answers_without_text']:,} without text; score {found['score_of_chosen']:.3g} over "
        f"{found['score_of_rejected']:.3g} (mean of all {found['score_mean']:.3g})"
    )
