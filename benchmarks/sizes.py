"""What the benchmarks over several sizes share: bytes on disk, and a table with a column for each size."""

from collections.abc import Callable
from pathlib import Path
from typing import Any


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def table(results: dict[int, Any], names: list[str], unit: str, title: str, cell: Callable[[Any], str]) -> str:
    """Markdown: a row for each of `names` that was measured, a column for each size, which counts `unit`s."""
    head = "| " + title + " | " + " | ".join(f"{n:,} {unit}" for n in results) + " |\n|---|" + "---:|" * len(results)
    measured = [name for name in next(iter(results.values())) if name in names]
    rows = (f"| {name} | " + " | ".join(cell(found[name]) for found in results.values()) + " |" for name in measured)
    return "\n".join([head, *rows]) + "\n"
