"""`make docs`: it builds without a warning, and the site needs nothing but its own files."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests import ROOT

pytestmark = pytest.mark.slow

pytest.importorskip("furo")


class Page(HTMLParser):
    """What a page loads, where it links to, and the anchors that it has."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.loads: set[str] = set()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.anchors |= {given["id"]} if "id" in given else set()
        if tag == "a" and "href" in given:
            self.links.add(given["href"])
        if tag == "link" and given.get("rel") not in ("index", "search", "next", "prev", "canonical"):
            self.loads.add(given["href"])
        self.loads |= {given[name] for name in ("src", "srcset", "data") if tag != "a" and name in given}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    line = next(line for line in (ROOT / "Makefile").read_text().splitlines() if "-m sphinx" in line)
    command = [sys.executable, *line.split()[1:-1], str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {file: Page(file) for file in site.rglob("*.html")}


def test_the_site_loads_nothing_from_anywhere_else(site, pages):
    assert len(pages) > 20
    for file, page in pages.items():
        assert page.loads, file
        for address in page.loads:
            assert not urlsplit(address).netloc, f"{file.name} loads {address}"
            assert (file.parent / unquote(urlsplit(address).path)).exists(), f"{file.name} loads {address}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", style.read_text()), style


def test_every_link_of_the_site_leads_to_one_of_its_files_and_an_anchor_in_it(site, pages):
    for file, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            assert target.is_file() and target.is_relative_to(site.resolve()), f"{file.name}: {link}"
            if parts.fragment and target.suffix == ".html":
                there = pages[site / target.relative_to(site.resolve())].anchors
                assert unquote(parts.fragment) in there, f"{file.name}: {link}"


def test_search_reads_its_index_as_a_script(site):
    """Not by a request, which browsers refuse to pages that were opened as files."""
    search = (site / "search.html").read_text()
    assert '<script src="searchindex.js"' in search
    index = (site / "searchindex.js").read_text()
    assert index.startswith("Search.setIndex(") and "docs/cache-format" in index


def test_links_out_of_the_documentation_give_the_file_itself(site, pages):
    linked = {site / "docs" / link for link in pages[site / "docs/quickstart.html"].links if "_downloads" in link}
    params = [file for file in linked if file.name == "params.yaml"]
    assert params and params[0].read_bytes() == (ROOT / "params.yaml").read_bytes()
