"""What the documentation claims, held against the code: its links, its commands, its parameters; and that it builds."""

import re
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "data/input/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks/results").glob("*.md")),
]
HISTORY = {ROOT / "CHANGELOG.md", ROOT / "docs/log.md", *(ROOT / "benchmarks/results").glob("*.md")}  # how things were
CURRENT = [page for page in PAGES if page not in HISTORY]


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; line: the first of its text, counted from 1."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@cache
def parsed(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text())


def blocks(*languages: str) -> list[Block]:
    """Of the pages that say how things are."""
    return [
        Block(page, token.map[0] + 2, token.info, token.content)
        for page in CURRENT
        for token in parsed(page)
        if token.type == "fence" and token.info in languages
    ]


def inline_code(page: Path) -> list[str]:
    found = [token.children or [] for token in parsed(page) if token.type == "inline"]
    return [child.content for children in found for child in children if child.type == "code_inline"]


def links(page: Path) -> list[str]:
    """Targets of links and images, as written."""
    found = [token.children or [] for token in parsed(page) if token.type == "inline"]
    return [
        str(child.attrGet("href" if child.type == "link_open" else "src"))
        for children in found
        for child in children
        if child.type in ("link_open", "image")
    ]


def anchors(page: Path) -> set[str]:
    """Those that a git host gives to headings: lower case, no punctuation, hyphens for spaces; repeated ones -1, -2."""
    tokens, seen, result = parsed(page), {}, set()
    for heading, text in pairwise(tokens):
        if heading.type == "heading_open":
            words = "".join(child.content for child in text.children or [] if child.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
            seen[slug] = seen.get(slug, -1) + 1
            result.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
    return result
