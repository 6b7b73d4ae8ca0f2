"""Tables and claims of the studies' pages, in Markdown."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Claim:
    """A sentence, whether the run's figures bear it out, and those figures."""

    text: str
    holds: bool
    evidence: str


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; columns after the first are aligned right."""
    lines = [list(columns), ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def claims_table(claims: Iterable[Claim]) -> str:
    rows = [(claim.text, "true" if claim.holds else "**false**", claim.evidence) for claim in claims]
    head = ["claim", "in this run", "figures"]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_page(path: Path, *parts: str) -> None:
    """The parts, a blank line between them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(part.strip() for part in parts) + "\n")
