"""One thing that `refcache doctor` looked at."""

import sys
from pathlib import Path
from typing import Literal, NamedTuple

State = Literal["ok", "warning", "broken"]


class Check(NamedTuple):
    """name: what was looked at. found: what there is, and if not ok what follows. mend: a command that mends it; where
    there is nothing to mend, one that adds what is absent, or None."""

    name: str
    state: State
    found: str
    mend: str | None = None


def pip(*words: str) -> str:
    """The command line of this Python's pip; words that a shell would take apart are quoted."""
    quoted = [f"'{word}'" if set(word) & set("[]<>=!*, ;") else word for word in words]
    return " ".join([str(Path(sys.executable)), "-m", "pip", *quoted])
