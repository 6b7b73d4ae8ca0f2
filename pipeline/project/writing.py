"""`refcache new`: a folder in which `dvc repro` runs the pipeline of an installed refcache."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

from ruamel.yaml import YAML

from pipeline.errors import RequestError, RunFailed
from pipeline.files import write_text
from pipeline.project.sources import need_preset, params_of, source
from pipeline.project.version import VERSION_FILE, VERSION_TEXT, installed_version

PLOTS_PAGE = ".dvc/plots/offline.html"
README = """\
# {name}

Preference optimisation with refcache, started from the preset `{preset}`.

- `dvc repro` runs what is out of date, then open `report/index.html`. `refcache doctor` checks this machine.
- `params.yaml` has every setting, `{input}/` takes your data, `dvc.yaml` names the stages. `dvc.lock` and `results/`
  belong into git; data, models and the reference cache are DVC's (`dvc push`).
- Upgrading: `pip install -U refcache`, then write the new version into `{version_file}`; until then the stages refuse
  to run. `dvc repro` now makes everything anew, unless `dvc commit --force` comes first, which keeps what there is.
- In a fresh clone: `python -P -m pipeline.report.vega {plots_page}` makes the page of `dvc plots show`.
"""


def new_project(folder: Path, preset: str) -> list[str]:
    """Write a project into `folder`, which is made; returns the paths that were written, relative to it.

    Where no git repository holds the folder it becomes one. Raises RequestError, with nothing written, for an unknown
    preset, a folder that has one of the files already, or one that git ignores.
    """
    need_preset(preset)
    files = project_files(preset, name=folder.resolve().name)
    taken = [name for name in [*files, PLOTS_PAGE] if (folder / name).exists() or (folder / name).is_symlink()]
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder} is a file; expected a folder, or a name that is free. Nothing was written.")
    if taken:
        raise RequestError(
            f"{folder} has {', '.join(taken)} already, which would be overwritten. Nothing was written. Name another "
            f"folder (for example {folder / 'refcache'}; one inside of a git repository works as well), or move these "
            "files away."
        )
    held = _held_by_git(folder)
    for name, text in files.items():
        write_text(folder / name, text)
    if not held:
        _git(folder, "init", "--quiet")
    from pipeline.report.vega import write_plots_page  # after all that can be refused: seconds

    write_plots_page(folder / PLOTS_PAGE)
    return [*files, PLOTS_PAGE]


def project_files(preset: str, *, name: str) -> dict[str, str]:
    """Path -> text of what `new_project` writes, but for the page of plots, which is built. name: of the project."""
    params = CHANGES["params.yaml"](params_of(preset))
    inputs = _input_folders(params)
    same = [".dvc/config", ".dvc/.gitignore", ".dvc/plots/cells.json", ".dvcignore"]
    guide = CHANGES["data/input/README.md"](source("data/input/README.md"))
    return {
        "params.yaml": params,
        "dvc.yaml": CHANGES["dvc.yaml"](source("dvc.yaml")),
        VERSION_FILE: VERSION_TEXT.format(version=installed_version()),
        **{file: source(file) for file in same},
        ".gitignore": CHANGES[".gitignore"](source(".gitignore")),
        **{f"{folder}/README.md": guide for folder in inputs},
        "README.md": README.format(
            name=name, preset=preset, input=inputs[0], version_file=VERSION_FILE, plots_page=PLOTS_PAGE
        ),
    }


def _dvc_of_a_project(text: str) -> str:
    """Stages call the console script, which no folder named `stages` misleads, and depend on its version."""
    text = text.replace("python -m stages ", "refcache ")
    return re.sub(r"^    params:\n", f"    params:\n      - {VERSION_FILE}: [refcache]\n", text, flags=re.MULTILINE)


def _params_of_a_project(text: str) -> str:
    """Its heading says what to do in a clone."""
    text = text.replace("presets/ holds complete files for real work", "`refcache new --list` names some for real work")
    return re.sub(r"cp presets/\S+ params\.yaml && dvc repro", "dvc repro", text)


def _ignored_in_a_project(text: str) -> str:
    return text.partition("# work on refcache itself")[0]


def _guide_of_a_project(text: str) -> str:
    return text.replace("[docs/data.md](../../docs/data.md#published-schemas)", "refcache's docs/data.md")


# What differs, on purpose, from the file of that name in the repository.
CHANGES: dict[str, Callable[[str], str]] = {
    "dvc.yaml": _dvc_of_a_project,
    "params.yaml": _params_of_a_project,
    ".gitignore": _ignored_in_a_project,
    "data/input/README.md": _guide_of_a_project,
}


def _input_folders(params: str) -> list[str]:
    """Where the stages look for files of one's own; DVC wants these folders to be there."""
    read = YAML(typ="safe", pure=True).load(params)
    return list(dict.fromkeys([read["prepare"]["input"], read["evaluate"]["suites_input"]]))


def _held_by_git(folder: Path) -> bool:
    """Whether a git repository holds `folder`, which need not exist yet. RequestError where it ignores it."""
    parent = next(path for path in [folder.resolve(), *folder.resolve().parents] if path.is_dir())
    if _git(parent, "rev-parse", "--is-inside-work-tree", check=False) != "true":
        return False
    if ignored := _git(parent, "check-ignore", str(folder.resolve() / "dvc.yaml"), check=False):
        raise RequestError(
            f"git ignores {ignored}, and DVC wants its files in git. Nothing was written. Name a folder that is not "
            "ignored, or one outside of this git repository."
        )
    return True


def _git(folder: Path, *words: str, check: bool = True) -> str:
    """What git printed; empty where it failed and that may be."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise RequestError("git was not found; DVC needs it. Nothing was written. (Debian: apt install git)") from error
    if check and done.returncode:
        raise RunFailed(f"git {' '.join(words)} in {folder} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout.strip() if not done.returncode else ""
