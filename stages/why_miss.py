"""`refcache why-miss`: would the next `score` reuse everything, and if not, why?"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stages.options import default_path_option, params_options

if TYPE_CHECKING:
    from pipeline.params import Params


@click.command(name="why-miss")
@default_path_option("--pairs", "data/prepared/pairs", "Pairs and responses from prepare.")
@default_path_option("--model", "models/reference", "The reference: a transformers folder (from sft).")
@default_path_option("--reference", "data/reference/logps", "The published reference cache.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@params_options
def command(params: "Params", pairs: Path, model: Path, reference: Path, as_json: bool) -> None:
    """Say whether the next `score` would reuse every row, and if not, why.

    Names the field of the identity that differs from what is published or journalled, with both values, and counts new
    responses and new prompts. Nothing is scored or changed. Exits with 0 whatever the answer.

    \b
    Example:
      refcache why-miss
      refcache why-miss --set score.dtype=bfloat16
    """
    from pipeline.reuse import explain_reuse

    found = explain_reuse(pairs=pairs, model=model, reference=reference, params=params.score)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    click.echo(
        f"{found['reusable']:,} of {found['responses']:,} responses would be reused, {found['missing']:,} scored "
        f"(reference {found['reference_id'][:12]})."
    )
    for reason in found["reasons"]:
        click.echo(f"- {reason}")
