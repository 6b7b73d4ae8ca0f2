"""What a Python process of ours finds in its environment, so that it imports the packages that this one imports."""

import os
import site
import sys
from collections.abc import Mapping
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]  # the folder of cache, pipeline, refcache and stages


def child_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """`environment` for a process that is started with `-m` and one of our modules.

    Its Python does not look into the working folder first, where a project may have a `pipeline` or a `cache` of its
    own, and finds this package also where it is not installed.
    """
    search = environment.get("PYTHONPATH")
    if str(HOME) not in site.getsitepackages():  # which are searched anyway, and first they would hide the library's
        search = os.pathsep.join(filter(None, [str(HOME), search]))
    return {**environment, "PYTHONSAFEPATH": "1"} | ({"PYTHONPATH": search} if search else {})


def same_path_environment() -> dict[str, str]:
    """The same for a process that imports what this one could import, in the same order."""
    return child_environment(os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
