"""The folder: is it a project, is it one for this version, and what does it want from the hub."""

import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import RequestError
from pipeline.project.check import Check
from pipeline.project.version import VERSION_FILE, installed_version, stated_version

PLOTS_PAGE = ".dvc/plots/offline.html"
HUB_SECONDS = 5.0


def place_checks(folder: Path, *, ask_hub: bool) -> Iterator[Check]:
    root = next((path for path in [folder, *folder.parents] if (path / ".dvc").is_dir()), None)
    if root is None or not (folder / "dvc.yaml").is_file():
        said = f"{folder} has no dvc.yaml" if root else f"{folder} is in no DVC project"
        yield Check("project", "warning", f"{said}; `dvc repro` has nothing to run here", "refcache new my-project")
    else:
        yield _project(folder, root)
        yield from _version(folder)
        if not (root / PLOTS_PAGE).is_file():
            mend = f"python -P -m pipeline.report.vega {root / PLOTS_PAGE}"
            yield Check("plots page", "warning", f"{root / PLOTS_PAGE} is absent; `dvc plots show` wants it", mend)
    params = folder / "params.yaml"
    if params.is_file():
        yield _params(params)
        yield from _hub(params, ask_hub)


def _project(folder: Path, root: Path) -> Check:
    git = next((path for path in [root, *root.parents] if (path / ".git").exists()), None)
    if git is None:
        return Check("project", "broken", f"DVC project {root}, in no git repository", f"git init {root}")
    clashing = [name for name in ("cache", "pipeline", "stages") if (folder / name / "__init__.py").is_file()]
    here = Path(__file__).resolve().parents[2]
    if clashing and here != folder.resolve() and "python -m stages" in (folder / "dvc.yaml").read_text():
        said = f"{', '.join(clashing)} of this folder hide refcache's from `python -m stages`, which dvc.yaml calls"
        return Check("project", "broken", said, "sed -i 's/python -m stages/refcache/' dvc.yaml")
    return Check("project", "ok", f"DVC project {root}, git repository {git}")


def _version(folder: Path) -> Iterator[Check]:
    here = installed_version()
    mend = f"echo 'refcache: {here}' > {VERSION_FILE} && dvc repro    (dvc commit --force: keep what there is)"
    try:
        stated = stated_version(folder)
    except RequestError as error:
        yield Check("version", "broken", str(error), mend)
        return
    if stated == here:
        yield Check("version", "ok", f"{VERSION_FILE} states the installed one, {here}")
    elif stated is not None:
        said = f"{VERSION_FILE} states {stated}, installed is {here}; the stages refuse to mix them"
        yield Check("version", "broken", said, mend)


def _params(file: Path) -> Check:
    from pipeline.params import load_params

    try:
        load_params(file, ())
    except RequestError as error:
        return Check("params.yaml", "broken", " ".join(str(error).split()), f"${{EDITOR:-vi}} {file}")
    return Check("params.yaml", "ok", "valid")


def _hub(file: Path, ask: bool) -> Iterator[Check]:
    """Nothing is asked of the network unless `ask`."""
    names = _named_on_the_hub(file)
    if not names:
        return
    said = f"params.yaml names {', '.join(names)}"
    if token := _token():
        yield Check("hub token", "ok", f"{said}; a token is in {token}")
    else:
        yield Check("hub token", "warning", f"{said}; no token, so that only public ones work", "hf auth login")
    if ask:
        yield _reachable(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))


def _named_on_the_hub(file: Path) -> list[str]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        read: Any = YAML(typ="safe", pure=True).load(file)
        model, prepare = read["model"], read["prepare"]
        named = [name for name in (model.get("name"), model.get("adapter")) if isinstance(name, str)]
        names = [name for name in named if not (file.parent / name).exists()]
        return names + ([prepare["hub"]["dataset"]] if prepare.get("source") == "hub" else [])
    except (YAMLError, KeyError, TypeError, AttributeError):
        return []  # what is wrong with it, the check of the whole file says


def _token() -> str | None:
    """Where huggingface_hub would find one."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name):
            return f"${name}"
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    file = Path(os.environ.get("HF_TOKEN_PATH") or Path(home) / "token").expanduser()
    return str(file) if file.is_file() else None


def _reachable(address: str) -> Check:
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=HUB_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # an answer is an answer
    except (OSError, ValueError) as error:
        said = f"{address} can't be reached ({error}); only copies in the Hugging Face cache are used"
        return Check("hub", "warning", said, f"curl -I {address}")
    return Check("hub", "ok", f"{address} answers")
