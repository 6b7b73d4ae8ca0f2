"""People search the page for the words that they were shown, so these are words that some message still has."""

import re
from collections.abc import Iterator
from types import CodeType

import pytest

from tests import ROOT

PAGE = (ROOT / "docs/troubleshooting.md").read_text()
QUOTED = sorted(set(re.findall(r'"([^"\n]+)"', re.sub(r"```.*?```|`[^`\n]*`", "", PAGE, flags=re.DOTALL))))
OTHERS = {"No file hash info found"}  # DVC's


def strings_of(code: CodeType) -> Iterator[str]:
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from strings_of(constant)


@pytest.fixture(scope="module")
def messages() -> str:
    """The constant parts of all strings of the code, one to a line, and setup.sh."""
    files = [file for folder in ("cache", "pipeline", "refcache", "stages") for file in (ROOT / folder).rglob("*.py")]
    strings = [text for file in files for text in strings_of(compile(file.read_text(), file, "exec"))]
    return "\n".join([(ROOT / "setup.sh").read_text(), *(" ".join(text.split()) for text in strings)])


def test_messages_are_quoted():
    assert len(QUOTED) > 40


@pytest.mark.parametrize("words", [words for words in QUOTED if words not in OTHERS])
def test_what_is_quoted_is_said(words, messages):
    assert words in messages
