"""`cache`, `pipeline` and `stages` are common names: whether Python finds ours under them, and what to do if not."""

import os
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("cache", "pipeline", "stages")
HOME = Path(__file__).resolve().parents[1]


class ForeignPackage(ImportError):
    """Another package has the name of one of ours and is found first; nothing can run."""


def check_packages() -> None:
    """Raise ForeignPackage unless all of PACKAGES stand beside this package. Imports none of them."""
    found = {name: _place(find_spec(name)) for name in PACKAGES}
    foreign = {name: place for name, place in found.items() if place != (HOME / name).resolve()}
    if foreign:
        raise ForeignPackage("\n".join([*_what_was_found(foreign), *_what_to_do(foreign)]))


def _place(spec: ModuleSpec | None) -> Path | None:
    """The folder of a package, the file of a plain module, None where there is neither."""
    if spec is None:
        return None
    if spec.submodule_search_locations is not None:
        return Path(next(iter(spec.submodule_search_locations))).resolve()
    return Path(spec.origin or ".").resolve()


def _what_was_found(foreign: dict[str, Path | None]) -> list[str]:
    said = ["refcache imports packages named cache, pipeline and stages, and Python finds others under these names:"]
    said += [f"  {name}: found {place or 'nothing'}, expected {HOME / name}" for name, place in foreign.items()]
    return [*said, "Nothing was run."]


def _what_to_do(foreign: dict[str, Path | None]) -> list[str]:
    if None in foreign.values():
        return ["The installation is incomplete. Run: pip install --force-reinstall --no-deps refcache"]
    folders = {place.parent for place in foreign.values() if place}
    named = {Path(entry or ".").resolve() for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry}
    here = Path.cwd().resolve()
    if HOME in folders or not folders <= {*named, here}:
        names = ", ".join(str(place) for place in foreign.values())
        return [f"Rename {names}, or install refcache in a virtual environment of its own, without the other package."]
    if folders <= named:
        return [f"Take {', '.join(map(str, sorted(folders)))} out of PYTHONPATH, or rename the folders above."]
    return [
        f"`python -m` looks into the working folder ({here}) first; the command `refcache` does not. Run "
        f"`refcache {' '.join(sys.argv[1:]) or '--help'}`, or rename the folders above."
    ]
