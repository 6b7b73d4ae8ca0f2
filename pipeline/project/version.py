"""Which refcache made a project's outputs: versions.yaml, a parameter file that every stage depends on."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline.errors import RequestError

VERSION_FILE = "versions.yaml"  # beside dvc.yaml
VERSION_TEXT = """\
# The refcache that makes this project's outputs; every stage depends on it (dvc.yaml). README.md: upgrading.
refcache: {version}
"""


def installed_version() -> str:
    """Of the distribution; 0 where the source runs without having been installed."""
    try:
        return version("refcache")
    except PackageNotFoundError:
        return "0"


def stated_version(project: Path) -> str | None:
    """What versions.yaml in the folder `project` says; None without that file, as in a clone. Raises RequestError where
    it says nothing that can be read."""
    file = project / VERSION_FILE
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    # Plain lines rather than YAML, whose reader takes longer to import than the command line takes to answer.
    stated = [
        line.partition("#")[0].partition(":")[2].strip(" \t'\"") for line in lines if line.startswith("refcache:")
    ]
    if len(stated) != 1 or not stated[0]:
        raise RequestError(
            f"{file.absolute()} has no line `refcache: ...`; expected `refcache: {installed_version()}`."
        )
    return stated[0]


def check_version(project: Path) -> None:
    """Raise RequestError where another refcache is installed than the project's outputs are to be made with."""
    stated, here = stated_version(project), installed_version()
    if stated not in (None, here):
        raise RequestError(
            f"{VERSION_FILE} says refcache {stated}, and {here} is installed: outputs of the two would stand "
            f"side by side. Nothing was run. Write `refcache: {here}` into {VERSION_FILE}: then `dvc repro` makes "
            "everything anew, and `dvc commit --force` keeps what there is as it is. Or go back: "
            f"pip install refcache=={stated}"
        )
