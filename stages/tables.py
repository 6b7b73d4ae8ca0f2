"""Tables on the terminal: drawn where there is one, plain columns otherwise, as for a pipe."""

import sys
from typing import Any

import click

SHOWN_TEXT = 100  # characters of a text; --json and --out have all of it

Table = tuple[str, list[str], list[list[str]]]  # title, header, rows


def echo_tables(tables: list[Table]) -> None:
    draw = _draw_table if sys.stdout.isatty() else _print_table
    for title, header, rows in tables:
        draw(title, header, rows)


def show(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, dict):
        return "  ".join(f"{name} {show(inner)}" for name, inner in value.items())
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.1f}"
    if isinstance(value, str):
        # Decoded text may hold control characters that would act on the terminal.
        text = repr(value)[1:-1]
        return text if len(text) <= SHOWN_TEXT else text[: SHOWN_TEXT - 1] + "…"
    return str(value)


def show_bytes(size: int) -> str:
    if size >= 2**30:
        return f"{size / 2**30:.2f} GiB"
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
