"""`refcache browse`: pairs and the reference's log-probs of their tokens, as a page to look through."""

from pathlib import Path

import click

from stages.options import LocalPath, default_path_option, trust_option


@click.command("browse")
@default_path_option("--pairs", "data/prepared/pairs", "Prepared pairs.")
@default_path_option("--reference", "data/reference/logps", "Reference cache.")
@default_path_option("--tokenizer", "data/prepared/tokenizer", "Tokenizer folder that prepare wrote.")
@click.option(
    "--answers",
    type=LocalPath(),
    help="Folder with CELL/samples.parquet, policies' answers to held-out prompts, e.g. results/answers.  "
    "[default: none are shown]",
)
@click.option(
    "--policy",
    "policies",
    type=LocalPath(),
    multiple=True,
    help="Folder of a trained policy, e.g. models/policies/dpo-0: show the log-probs that `evaluate` kept; repeatable.",
)
@default_path_option("--out", "browse", "Folder for index.html and its data.")
@click.option("--split", help="Pairs of this split only: train or test.  [default: all]")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=10_000,
    show_default=True,
    help="Pairs at most, the first ones. Some 8 kB a pair of UltraFeedback's length.",
)
@click.option("--sample", type=click.IntRange(min=1), help="Draw so many pairs at random instead of the first ones.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of --sample.")
@trust_option
def command(
    pairs: Path,
    reference: Path,
    tokenizer: Path,
    answers: Path | None,
    policies: tuple[Path, ...],
    out: Path,
    split: str | None,
    limit: int,
    sample: int | None,
    seed: int,
    trust_remote_code: bool,
) -> None:
    """Write pairs with the reference's token log-probs as a page that opens offline: filter, order, search, read.

    Responses that the reference cache lacks are shown without log-probs, and counted. Nothing is computed.

    \b
    Example:
      refcache browse
      refcache browse --split test --answers results/answers --policy models/policies/dpo-0
      refcache browse --sample 1000
    """
    from pipeline.browse.pairs import Choice, write_browser

    choice = Choice(split, None if sample else limit, sample, seed)
    found = write_browser(
        pairs=pairs,
        reference=reference,
        tokenizer=tokenizer,
        out=out,
        choice=choice,
        answers=answers,
        policies=policies,
        trust_remote_code=trust_remote_code,
    )
    rest = "" if found.pairs == found.total else f" of {found.total:,} (--split, --limit and --sample choose)"
    click.echo(f"browse: {found.pairs:,} pairs{rest} in {found.page}")
    if found.missing:
        click.echo(
            f"browse: {found.missing:,} of {found.responses:,} responses have no row in {reference} and are shown "
            "without log-probs; `refcache why-miss` says why, `dvc repro score` scores them.",
            err=True,
        )
