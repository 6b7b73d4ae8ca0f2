"""`refcache why-miss`: would the next `score`, or `sketch`, reuse everything, and if not, why?"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stages.options import default_path_option, params_options

if TYPE_CHECKING:
    from pipeline.params import Params

LOGPS, SKETCHES = Path("data/reference/logps"), Path("data/reference/sketches")


@click.command(name="why-miss")
@default_path_option("--pairs", "data/prepared/pairs", "Pairs and responses from prepare.")
@default_path_option("--model", "models/reference", "The reference: a transformers folder (from sft).")
@click.option("--sketches", is_flag=True, help="Ask of the next `sketch` rather than `score`.")
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    help=f"The published reference cache.  [default: {LOGPS}, with --sketches {SKETCHES}]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@params_options
def command(params: "Params", pairs: Path, model: Path, sketches: bool, reference: Path | None, as_json: bool) -> None:
    """Say whether the next `score`, or with --sketches the next `sketch`, would reuse every row, and if not, why.

    Names the field of the identity that differs from what is published or journalled, with both values, and counts new
    responses and new prompts. Nothing is computed or changed. Exits with 0 whatever the answer.

    \b
    Example:
      refcache why-miss
      refcache why-miss --set score.dtype=bfloat16
      refcache why-miss --sketches --set trainable=last_block
    """
    from pipeline.upkeep.why_miss import explain_reuse, explain_sketch_reuse

    if sketches:
        found = explain_sketch_reuse(
            pairs=pairs,
            model=model,
            sketches=reference or SKETCHES,
            params=params.sketch,
            trainable=params.trainable,
            trust_remote_code=params.model.trust_remote_code,
        )
    else:
        found = explain_reuse(pairs=pairs, model=model, reference=reference or LOGPS, params=params.score)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    if found["identity"].get("mode") == "none":
        click.echo("sketch.mode is none: the next `sketch` takes no gradient and drops what is published.")
        return
    computed = "sketched" if sketches else "scored"
    click.echo(
        f"{found['reusable']:,} of {found['responses']:,} responses would be reused, {found['missing']:,} {computed} "
        f"(reference {found['reference_id'][:12]})."
    )
    for reason in found["reasons"]:
        click.echo(f"- {reason}")
