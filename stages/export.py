"""`refcache export`: pairs with their reference log-probs, for other trainers and programs."""

from pathlib import Path

import click

from stages.options import default_path_option, path_option, trust_option

FORMS = ("trl", "jsonl", "parquet", "open-instruct", "fairseq2")
# What becomes of pairs whose texts give other tokens than those that were scored.
OTHERS = {
    "trl": "; the others' tokens are in prompt_ids, chosen_ids, rejected_ids",
    "open-instruct": "; the others would be trained on with log-probs of other tokens (docs/export.md says which)",
}


@click.command(name="export")
@click.option("--to", type=click.Choice(FORMS), required=True, help="What reads it.")
@path_option("--out", "Folder to write; an earlier export there is replaced.")
@default_path_option("--pairs", "data/prepared/pairs", "Prepared pairs and responses.")
@default_path_option("--reference", "data/reference/logps", "The published reference cache.")
@default_path_option(
    "--tokenizer", "data/prepared/tokenizer", "Tokenizer of the pairs; trl, fairseq2 and open-instruct need it."
)
@click.option(
    "--split",
    "splits",
    type=click.Choice(["train", "test"]),
    multiple=True,
    default=["train"],
    show_default=True,
    help="Pairs to write; repeatable.",
)
@click.option("--allow-missing", is_flag=True, help="Nulls for pairs that the cache lacks, where that is an error.")
@click.option("--hash", "hash_", help="With open-instruct: the HASH of the HASH.pt that its log names.")
@trust_option
def command(
    to: str,
    out: Path,
    pairs: Path,
    reference: Path,
    tokenizer: Path,
    splits: tuple[str, ...],
    allow_missing: bool,
    hash_: str | None,
    trust_remote_code: bool,
) -> None:
    """Write pairs with texts, token ids and reference log-probs (nats) for other programs (docs/export.md).

    The folder appears whole or not at all, with export.json, which says whose log-probs they are.

    \b
    Example:
      refcache export --to parquet --out exports/pairs
      refcache export --to trl --split train --split test --out exports/trl
      refcache export --to open-instruct --hash 0a1b2c3d4e5f6071 --out exports/open-instruct
    """
    from pipeline.export.export import export_pairs

    done = export_pairs(
        pairs=pairs,
        reference=reference,
        out=out,
        to=to,
        splits=tuple(dict.fromkeys(splits)),
        tokenizer=tokenizer,
        allow_missing=allow_missing,
        hash=hash_,
        trust_remote_code=trust_remote_code,
    )
    for split, count in done["pairs"].items():
        missing = done["pairs_without_log_probs"][split]
        click.echo(f"{out}: {count:,} {split} pairs" + f", {missing:,} of them without log-probs" * bool(missing))
    if again := done.get("encoded_again"):
        checked, same = again["pairs"], again["same_token_ids"]
        others = "" if same == checked else OTHERS.get(to, "")
        click.echo(
            f"texts encoded again give the scored tokens for {same:,} of {checked:,} pairs that were tried{others}"
            if checked
            else f"{tokenizer} has no chat template, so whether one gives the scored tokens was not tried"
        )
