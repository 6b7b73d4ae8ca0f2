"""`refcache suites`: further pairs that policies are judged by -> pairs and responses of each suite."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from stages.options import params_options, path_option

if TYPE_CHECKING:
    from pipeline.params import Params


@click.command()
@path_option("--tokenizer", "The prepared tokenizer (from prepare), with its chat template.")
@path_option("--out", "Folder of suites to write; replaced as a whole.")
@params_options
def command(params: "Params", tokenizer: Path, out: Path) -> None:
    """Tokenise and key the preference suites of evaluate.suites.

    Each is a set of pairs in any form that prepare reads: files of evaluate.suites_input, or a split of a hub dataset.
    Nothing trains on them; score scores their responses under the reference, and evaluate judges every policy by them.
    A suite that can't be prepared leaves all earlier ones in place.

    \b
    Example:
      refcache suites --tokenizer data/prepared/tokenizer --out data/prepared/suites
    """
    import os

    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # before pyarrow: its own keeps what was freed
    from pipeline.data.suites import prepare_suites

    done = prepare_suites(
        params.evaluate.suites,
        prepare=params.prepare,
        folder=params.evaluate.suites_input,
        tokenizer=tokenizer,
        out=out,
        trust_remote_code=params.model.trust_remote_code,
    )
    for name, counts in done.items():
        click.echo(
            f"suites: {name}: {counts['pairs']['train']:,} pairs over {counts['prompts']['train']:,} prompts, "
            f"{counts['distinct_responses']:,} distinct responses"
        )
    if not done:
        click.echo("suites: none (evaluate.suites is empty)")
