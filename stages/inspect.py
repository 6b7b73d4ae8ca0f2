"""`refcache inspect`: what a reference cache holds, for people and, with --json, for programs."""

import json
from pathlib import Path
from typing import Any

import click

from stages.options import trust_option
from stages.tables import Table, echo_tables, show, show_bytes

DEFAULT_TOKENIZER = Path("data/prepared/tokenizer")
DISTRIBUTIONS = ("n_tokens", "sum_logp", "token_logp", "grad_norm")


@click.command(name="inspect")
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help=f"Tokenizer folder that decodes the extreme rows.  [default: {DEFAULT_TOKENIZER}, where it exists]",
)
@click.option(
    "--extremes", type=click.IntRange(min=0), default=5, show_default=True, help="Rows to show at each end, 0 for none."
)
@trust_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(path: Path, tokenizer: Path | None, extremes: int, trust_remote_code: bool, as_json: bool) -> None:
    """Show what the reference cache in folder PATH holds: identity, size, distributions, extreme rows, drift.

    Log-probs are in nats. Of sketches: groups of parameters, and the norms of the gradients. PATH may be an address in
    object storage (s3://BUCKET/PATH); its shards are fetched to .refcache/remote and their digests checked.

    \b
    Example:
      refcache inspect data/reference/logps
      refcache inspect data/reference/logps --json | jq .token_logp
      refcache inspect data/reference/sketches
      refcache inspect s3://team/reference/v1
    """
    from pipeline.upkeep.inspection import inspect_reference

    if tokenizer is None and DEFAULT_TOKENIZER.is_dir():
        tokenizer = DEFAULT_TOKENIZER
    found = inspect_reference(path, tokenizer=tokenizer, extremes=extremes, trust_remote_code=trust_remote_code)
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    echo_tables(_tables(found))
    if tokenizer is None and "tokens" in found:
        click.echo(f"No text: {DEFAULT_TOKENIZER} does not exist; give --tokenizer.")


def _tables(found: dict[str, Any]) -> list[Table]:
    size = sum(shard["bytes"] for shard in found["shards"])
    facts = {"path": found["path"], "reference_id": found["reference_id"], **found["identity"]}
    facts |= {"rows": found["rows"]} | ({"response tokens": found["tokens"]} if "tokens" in found else {})
    facts |= {"shards": f"{len(found['shards'])}, {show_bytes(size)}", "format_version": found["format_version"]}
    tables = [("Reference cache", ["field", "value"], [[name, show(value)] for name, value in facts.items()])]
    measured = {name: found[name] for name in DISTRIBUTIONS if found.get(name)}
    if measured:
        columns = list(next(iter(measured.values())))
        rows = [[name, *(show(values[column]) for column in columns)] for name, values in measured.items()]
        title = "Distributions of gradient norms" if "grad_norm" in measured else "Distributions (log-probs in nats)"
        tables.append((title, ["", *columns], rows))
    for name, rows in found["extremes"].items():
        if rows:
            columns = [column for column in rows[0] if rows[0][column] is not None]
            title = name.replace("_", " ", 1).capitalize()
            tables.append((title, columns, [[show(row[column]) for column in columns] for row in rows]))
    if found.get("groups"):
        groups = [[name, show(numbers)] for name, numbers in found["groups"].items()]
        tables.append(("Groups of parameters", ["group", "numbers a row"], groups))
    if found.get("drift") is not None:
        tables += _drift_tables(found["drift"])
    return tables


def _drift_tables(drift: dict[str, Any]) -> list[Table]:
    facts = {name: show(value) for name, value in drift.items() if name != "worst"}
    if "flagged" in drift:
        above = f"{drift['responses']} sampled rows above {show(drift['tolerance'])} nats (train.drift_tolerance)"
        facts["flagged"] = f"{drift['flagged']} of {above}"
    if "rescored" in drift:
        scored = f"{drift['rescored']['rows']} rows, with transformers in float32"
        facts["rescored"] = f"{scored}; digest of their keys {drift['rescored']['keys']}"
    title = "Drift: cached log-probs against the trainer's own forward (nats)"
    tables = [(title, ["field", "value"], [list(fact) for fact in facts.items()])]
    if drift["worst"]:
        columns = list(drift["worst"][0])
        rows = [[show(row[column]) for column in columns] for row in drift["worst"]]
        tables.append(("Most drift among the sampled rows", columns, rows))
    return tables
