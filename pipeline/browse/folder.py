"""The folder that `refcache browse` makes: one page, and what it shows in numbered files that it loads when asked.

    OUT/index.html                 the page
    OUT/style.css, OUT/*.js        what it looks like and does
    OUT/data/index.js              of every pair the small columns, which filters and orders read
    OUT/data/texts-00000.js        prompt, responses and source of PAIRS_A_FILE pairs, which the search reads
    OUT/data/tokens-00000.js       the log-probs of their tokens, and what else is shown of a pair

Data are scripts since a page from a disk may load nothing else. Each is one call with JSON in it, in ASCII.
"""

import json
import re
from collections.abc import Iterator
from importlib.resources import files
from itertools import count, islice
from pathlib import Path
from typing import Any

import jinja2

from pipeline.files import write_text

PAIRS_A_FILE = 50
SCRIPTS = ("store.js", "pair.js", "list.js")
DATA_FILE = re.compile(r"(?:index|(?:texts|tokens)-\d{5})\.js")

Row = tuple[list[Any], dict[str, Any]]  # a pair's entry in a file of texts, and in one of tokens


def as_script(function: str, *arguments: Any) -> str:
    """A call of `function` with JSON arguments that no reader can take for anything else.

    ASCII alone: whatever encoding is assumed, and U+2028 is no line break. NaN would be no JSON: a fault of ours.
    """
    texts = [
        json.dumps(argument, ensure_ascii=True, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
        for argument in arguments
    ]
    return f"{function}({','.join(texts)});\n"


class PageFolder:
    """Clears what an earlier run left in `out` (its own files alone); the page comes last, so that it means whole."""

    def __init__(self, out: Path) -> None:
        self._out, self._data = out, out / "data"
        (out / "index.html").unlink(missing_ok=True)
        self._data.mkdir(parents=True, exist_ok=True)
        for file in self._data.iterdir():
            if DATA_FILE.fullmatch(file.name):
                file.unlink()

    def write_pairs(self, rows: Iterator[Row]) -> None:
        """In the order of the index."""
        for number in count():
            batch = list(islice(rows, PAIRS_A_FILE))
            if not batch:
                return
            for kind, entries in (("texts", [row[0] for row in batch]), ("tokens", [row[1] for row in batch])):
                write_text(self._data / f"{kind}-{number:05d}.js", as_script(f"browse.{kind}", number, entries))

    def write_page(self, index: dict[str, Any], facts: dict[str, Any]) -> Path:
        """index: what the scripts read. facts: what the template says."""
        write_text(self._data / "index.js", as_script("browse.index", index))
        package = files("pipeline.browse")
        report_style = files("pipeline.report").joinpath("report_style.html.j2").read_text(encoding="utf-8")
        own_style = package.joinpath("browse.css").read_text(encoding="utf-8")
        write_text(self._out / "style.css", report_style + own_style)
        for name in SCRIPTS:
            write_text(self._out / name, package.joinpath(name).read_text(encoding="utf-8"))
        write_text(self._out / "index.html", _template().render(facts, scripts=SCRIPTS))
        return self._out / "index.html"


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.browse", "."),
        autoescape=True,  # paths and categories come from data
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["count"] = "{:,}".format
    return environment.get_template("browse.html.j2")
