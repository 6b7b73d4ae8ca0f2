"""People search the page for the words that they were shown, so these are words that some message still has."""

import ast
import re

import pytest

from tests import ROOT

PAGE = (ROOT / "docs/troubleshooting.md").read_text()
QUOTED = sorted(set(re.findall(r'"([^"\n]+)"', re.sub(r"```.*?```|`[^`\n]*`", "", PAGE, flags=re.DOTALL))))
OTHERS = {"No file hash info found"}  # DVC's


@pytest.fixture(scope="module")
def messages() -> str:
    """The constant parts of all strings of the code, one to a line, and setup.sh."""
    parts = [(ROOT / "setup.sh").read_text()]
    for folder in ("cache", "pipeline", "refcache", "stages"):
        trees = [ast.parse(file.read_text()) for file in (ROOT / folder).rglob("*.py")]
        constants = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        parts += [" ".join(node.value.split()) for node in constants if isinstance(node.value, str)]
    return "\n".join(parts)


def test_messages_are_quoted():
    assert len(QUOTED) > 40


@pytest.mark.parametrize("words", [words for words in QUOTED if words not in OTHERS])
def test_what_is_quoted_is_said(words, messages):
    assert words in messages
