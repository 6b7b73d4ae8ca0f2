"""Which modules the project has and which of them each one needs, read off the source; nothing is imported."""

import ast
import re
from functools import cache
from pathlib import Path

from tests import ROOT

PACKAGES = ("cache", "pipeline", "refcache", "stages", "studies")
NAMED = re.compile(rf"(?:{'|'.join(PACKAGES)})(?:\.[A-Za-z_]\w*)+")


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    """Every module of the project by its dotted name; a package goes by its __init__."""
    return {name_of(file): file for package in PACKAGES for file in files(package)}


def module_in(dotted: str) -> str | None:
    """The longest beginning of `dotted` that is a module: pipeline.params for `pipeline.params.Params`."""
    parts = dotted.split(".")
    beginnings = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((name for name in beginnings if name in modules()), None)


@cache
def _names(file: Path) -> tuple[frozenset[str], frozenset[str]]:
    """What `file` imports, and which of its strings name a module."""
    imported, strings = set[str](), set[str]()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and NAMED.fullmatch(node.value):
            strings.add(node.value)
    return frozenset(imported), frozenset(strings)


def imports(file: Path) -> frozenset[str]:
    """Dotted names that `file` imports anywhere, also inside functions and for types alone."""
    return _names(file)[0]


def named_in_strings(file: Path) -> frozenset[str]:
    """Dotted names in strings that begin as a module of ours does: to start it, to import it later, to patch it."""
    return _names(file)[1]


@cache
def needs(module: str) -> set[str]:
    """The modules that `module` imports or names in a string."""
    file = modules()[module]
    return {name for name in map(module_in, imports(file) | named_in_strings(file)) if name and name != module}


def reached(module: str) -> set[str]:
    """`module` and all that it needs, also by way of others."""
    found, waiting = set[str](), [module]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += needs(name)
    return found
