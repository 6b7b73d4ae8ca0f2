"""The files that a project starts with: those of this repository, or their copies in the wheel (setup.py)."""

import re
from pathlib import Path

from pipeline.errors import RequestError

DEMO = "demo"  # the repository's own params.yaml
_STUDY = "study-"


def source_folder() -> Path:
    """Where params.yaml, dvc.yaml, presets/ and the rest are; RequestError where an installation lacks them."""
    package = Path(__file__).parent
    for folder in (package / "files", package.parents[1]):
        if (folder / "dvc.yaml").is_file() and (folder / "presets").is_dir():
            return folder
    raise RequestError(
        f"{package / 'files'} is absent, where the wheel has the files of a new project. The installation is "
        "incomplete. Run: pip install --force-reinstall --no-deps refcache"
    )


def source(name: str) -> str:
    """The text of one of these files, by its path in the repository."""
    return (source_folder() / name).read_text(encoding="utf-8")


def presets() -> dict[str, str]:
    """Name -> what it is for, in one line; the demo first.

    The studies' are left out: they are for pipelines of their own under studies/, which only a clone has.
    """
    names = sorted(path.stem for path in (source_folder() / "presets").glob("*.yaml"))
    return {name: _purpose(params_of(name)) for name in [DEMO, *names] if not name.startswith(_STUDY)}


def params_of(preset: str) -> str:
    """The text of its params.yaml, as it stands in the repository."""
    return source("params.yaml" if preset == DEMO else f"presets/{preset}.yaml")


def need_preset(name: str) -> None:
    """Raise RequestError, naming those there are, unless `name` is one of them."""
    known = presets()
    if name in known:
        return
    study = name.startswith(_STUDY) and (source_folder() / f"presets/{name}.yaml").is_file()
    reason = "is for a study, which has code and a dvc.yaml of its own: run it in a clone" if study else "is unknown"
    listed = "\n".join(f"  {name}: {purpose}" for name, purpose in known.items())
    raise RequestError(f"The preset {name} {reason}. Nothing was written. There are:\n{listed}")


def _purpose(text: str) -> str:
    """What the comment at the top of a params.yaml begins with, up to a full stop or a colon."""
    comment = " ".join(line.removeprefix("#").strip() for line in text.partition("\n\n")[0].splitlines())
    comment = comment.rpartition("This one is the embedded demo: ")[2]  # before it stands what all params.yaml are
    sentence = re.split(r"[.:](?:\s|$)", comment, maxsplit=1)[0]
    return sentence[:1].upper() + sentence[1:]
