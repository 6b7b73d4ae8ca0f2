"""The documentation as a site, `make docs`: README, docs/ and what they link to, as the git host shows them.

The source folder is the repository, not docs/, so that a link to ../benchmarks/results/x.md leads to a page here too.
Other files that are linked to (params.yaml, sources) are copied beside the pages; links to folders become plain text.
Warnings are errors: a link or anchor that leads nowhere, and a page that NAV lacks.
"""

import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes

ROOT = Path(__file__).resolve().parents[1]

# Heading -> (title, page) or, with the page's own title, (None, page). A new page needs a line here.
NAV: dict[str, list[tuple[str | None, str]]] = {
    "Start": [
        ("Quickstart", "docs/quickstart"),
        ("A project of your own", "docs/project"),
        ("Your data", "docs/data"),
        ("Files to put in", "data/input/README"),
        ("Models", "docs/models"),
        ("Commands", "docs/commands"),
        ("Troubleshooting", "docs/troubleshooting"),
    ],
    "Score, train, judge": [
        ("Scoring", "docs/scoring"),
        ("Objectives", "docs/objectives"),
        ("Training", "docs/training"),
        ("AuxDPO", "docs/auxdpo"),
        ("Gradient sketches", "docs/sketches"),
        ("Pairs made by the reference", "docs/sampling"),
        ("Evaluation", "docs/evaluation"),
        ("The report", "docs/report"),
    ],
    "The cache": [
        ("From Python", "docs/api"),
        ("In TRL", "docs/trl"),
        ("Exports", "docs/export"),
        ("A page to look through", "docs/browse"),
        ("Formats", "docs/cache-format"),
        ("Sharing", "docs/sharing"),
        ("Numerics", "docs/numerics"),
    ],
    "Size and speed": [
        ("Scaling", "docs/scaling"),
        ("Many machines", "docs/ray"),
        ("Performance", "docs/performance"),
        ("Measurements", "benchmarks/results/README"),
    ],
    "Behind it": [
        ("Architecture", "docs/architecture"),
        ("Studies", "docs/studies/README"),
        ("Log", "docs/log"),
        ("Changes", "CHANGELOG"),
        ("Contributing", "CONTRIBUTING"),
    ],
}
# Pages reached from another one's text; they take no line of the side bar.
UNDER = {"docs/studies/README": "docs/studies/*", "benchmarks/results/README": "benchmarks/results/*"}

project = "refcache"
html_title = "refcache"
root_doc = "README"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/**.md",
    "data/input/README.md",
    "benchmarks/results/*.md",
]
exclude_patterns = [".*", "site", "models", "report"]
extensions = ["myst_parser"]
myst_heading_anchors = 4
nitpicky = True
highlight_language = "none"
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["wide.css"]
html_copy_source = False
html_show_sphinx = False


def toctree(lines: list[str], *options: str) -> str:
    return "\n".join(["", "```{toctree}", ":hidden:", *options, "", *lines, "```", ""])


def add_navigation(app: Any, page: str, source: list[str]) -> None:
    """Append the side bar, which is no concern of who reads the page on a git host."""
    if page == root_doc:
        for heading, entries in NAV.items():
            lines = [f"{title} </{entry}>" if title else f"/{entry}" for title, entry in entries]
            source[0] += toctree(lines, f":caption: {heading}")
    elif page in UNDER:
        source[0] += toctree([f"/{UNDER[page]}"], ":glob:")


def unlink_folders(app: Any, document: nodes.document) -> None:
    """A git host lists a folder that is linked to; the site has no such page, so the words stay and the link goes."""
    for link in list(document.findall(addnodes.pending_xref)):
        if link["reftype"] == "myst" and link["refdomain"] is None:
            folder = (Path(app.env.doc2path(link["refdoc"])).parent / link["reftarget"]).resolve()
            if folder.is_dir() and folder.is_relative_to(ROOT):
                link.replace_self(link.children)


def copy_home_page(app: Any, error: Exception | None) -> None:
    if error is None:
        shutil.copyfile(Path(app.outdir) / "README.html", Path(app.outdir) / "index.html")


def setup(app: Any) -> None:
    app.connect("source-read", add_navigation)
    app.connect("doctree-read", unlink_folders)
    app.connect("build-finished", copy_home_page)
