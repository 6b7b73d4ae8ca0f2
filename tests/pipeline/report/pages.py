"""Reading a page that was made: its words, its tables, its charts' data."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path


def words_of(page: Path) -> str:
    """The page's text as it is read, without scripts."""
    body = re.sub(r"<(script|style)\b.*?</\1>", " ", page.read_text(), flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


def chart_data(page: Path) -> dict:
    return json.loads(re.search(r'id="report-data">(.*?)</script>', page.read_text(), re.DOTALL)[1])


def tables_in(page: Path, section: str) -> list[list[list[str]]]:
    """The rows of the tables in the section of that id, each cell as text; empty without such a section."""
    found = re.search(rf'<section id="{section}".*?</section>', page.read_text(), re.DOTALL)
    reader = _Tables()
    reader.feed(found[0] if found else "")
    return reader.tables


class _Tables(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self._in_cell = False

    def handle_starttag(self, tag, attrs):
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "br" and self._in_cell:
            self.tables[-1][-1][-1] += " "
        self._in_cell = tag in ("td", "th") or (self._in_cell and tag not in ("tr", "table"))

    def handle_endtag(self, tag):
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self._in_cell:
            self.tables[-1][-1][-1] += data
