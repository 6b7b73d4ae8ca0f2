"""`refcache inspect`: what a reference cache holds, for people and, with --json, for programs."""

import json
import sys
from pathlib import Path
from typing import Any

import click

DEFAULT_TOKENIZER = Path("data/prepared/tokenizer")
SHOWN_TEXT = 100  # characters of a response in the tables; --json has all of it


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
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(path: Path, tokenizer: Path | None, extremes: int, as_json: bool) -> None:
    """Show what the reference cache in folder PATH holds: identity, size, distributions, extreme rows, drift.

    Log-probs are in nats.

    \b
    Example:
      refcache inspect data/reference/logps
      refcache inspect data/reference/logps --json | jq .token_logp
    """
    from pipeline.inspection import inspect_reference

    if tokenizer is None and DEFAULT_TOKENIZER.is_dir():
        tokenizer = DEFAULT_TOKENIZER
    found = inspect_reference(path, tokenizer=tokenizer, extremes=extremes)
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    draw = _draw_table if sys.stdout.isatty() else _print_table
    for title, header, rows in _tables(found):
        draw(title, header, rows)
    if tokenizer is None:
        click.echo(f"No text: {DEFAULT_TOKENIZER} does not exist; give --tokenizer.")


Table = tuple[str, list[str], list[list[str]]]


def _tables(found: dict[str, Any]) -> list[Table]:
    size = sum(shard["bytes"] for shard in found["shards"])
    facts = {"path": found["path"], "reference_id": found["reference_id"], **found["identity"]}
    facts |= {"rows": found["rows"], "response tokens": found["tokens"]}
    facts |= {"shards": f"{len(found['shards'])}, {_show_bytes(size)}", "format_version": found["format_version"]}
    tables = [("Reference cache", ["field", "value"], [[name, _show(value)] for name, value in facts.items()])]
    measured = {name: found[name] for name in ("n_tokens", "sum_logp", "token_logp") if found[name]}
    if measured:
        columns = list(next(iter(measured.values())))
        rows = [[name, *(_show(values[column]) for column in columns)] for name, values in measured.items()]
        tables.append(("Distributions (log-probs in nats)", ["", *columns], rows))
    for name, rows in found["extremes"].items():
        if rows:
            columns = [column for column in rows[0] if rows[0][column] is not None]
            title = name.replace("_", " ", 1).capitalize()
            tables.append((title, columns, [[_show(row[column]) for column in columns] for row in rows]))
    if found["drift"] is not None:
        tables += _drift_tables(found["drift"])
    return tables


def _drift_tables(drift: dict[str, Any]) -> list[Table]:
    facts = {name: _show(value) for name, value in drift.items() if name != "worst"}
    if "flagged" in drift:
        above = f"{drift['responses']} sampled rows above {_show(drift['tolerance'])} nats (train.drift_tolerance)"
        facts["flagged"] = f"{drift['flagged']} of {above}"
    if "rescored" in drift:
        scored = f"{drift['rescored']['rows']} rows, with transformers in float32"
        facts["rescored"] = f"{scored}; digest of their keys {drift['rescored']['keys']}"
    title = "Drift: cached log-probs against the trainer's own forward (nats)"
    tables = [(title, ["field", "value"], [list(fact) for fact in facts.items()])]
    if drift["worst"]:
        columns = list(drift["worst"][0])
        rows = [[_show(row[column]) for column in columns] for row in drift["worst"]]
        tables.append(("Most drift among the sampled rows", columns, rows))
    return tables


def _show(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, dict):
        return "  ".join(f"{name} {_show(inner)}" for name, inner in value.items())
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.1f}"
    if isinstance(value, str):
        # Decoded text may hold control characters that would act on the terminal.
        text = repr(value)[1:-1]
        return text if len(text) <= SHOWN_TEXT else text[: SHOWN_TEXT - 1] + "…"
    return str(value)


def _show_bytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"


def _print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    click.echo(title)
    for row in [header, *rows]:
        click.echo("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    click.echo()


def _draw_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(title=title, title_justify="left")
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text, since a response may look like markup
    Console().print(table)
