"""The `constraint` stage: what of the sketches a variant depends on."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from stages.options import params_options, path_option

if TYPE_CHECKING:
    from pipeline.params import Params


@click.command("constraint")
@click.option("--variant", required=True, help="Name under train.variants.")
@path_option("--sketches", "Gradient sketches from sketch.")
@path_option("--out", "JSON file to write: the sketches' digest, or null, and what null_weight counts in.")
@params_options
def command(params: "Params", variant: str, sketches: Path, out: Path) -> None:
    """Write which sketches a variant trains with: for most, none.

    DVC trains a variant anew when this file changes, so that other sketches concern only variants that read them.

    \b
    Example:
      refcache constraint --variant auxdpo --sketches data/reference/sketches \\
        --out data/reference/constraints/auxdpo.json
    """
    from pipeline.auxdpo.requirements import write_stamp

    write_stamp(variant, params.train.variant(variant), sketches, out)
