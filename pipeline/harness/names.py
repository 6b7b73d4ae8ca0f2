"""From the names in evaluate.tasks to the harness's index of what they mean, and to the tasks a name stands for.

Imports lm_eval: modules import this one when they need it.
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.tasks import TaskManager

from pipeline.errors import RequestError

# Names of papers' settings: the harness's task, and what is changed of it.
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {"gsm8k_cot_4shot": ("gsm8k_cot", {"num_fewshot": 4})}

_HARNESS = Path(lm_eval.tasks.__file__).parent
Index = dict[str, Any]  # name -> lm_eval's Entry


class Named:
    """names: of tasks, groups and tags to load, in the order asked for. index: all they need, by name."""

    def __init__(self, manager: Any, names: list[str]) -> None:
        self.manager, self.names = manager, names

    @property
    def index(self) -> Index:
        index: Index = self.manager.task_index
        return index

    def leaves(self) -> dict[str, list[str]]:
        """Every task that runs, with the groups that it is asked for by, nearest first."""
        found: dict[str, list[str]] = {}
        for name in self.names:
            for leaf, groups in _leaves(name, self.index, ()):
                if leaf in self.index:
                    found.setdefault(leaf, list(groups))
        return found

    def put(self, name: str, of: str, changes: Mapping[str, Any], folder: Path) -> None:
        """Let `name` mean the task `of` with changes; folder: for a file that must live until it is loaded."""
        entry = self.index[of]
        path = folder / f"{len(list(folder.iterdir()))}.yaml"
        path.write_text(json.dumps({"include": str(entry.yaml_path), **changes}), encoding="utf-8")
        self.index[name] = replace(entry, name=name, yaml_path=path, cfg=(entry.cfg or {}) | dict(changes))


def find_tasks(asked: Sequence[str], scratch: Path) -> Named:
    """Everything that evaluate.tasks names. Raises RequestError for what is unknown or can't be read."""
    paths = {name: Path(name) for name in asked if _is_path(name)}
    plain = [PRESETS[name][0] if name in PRESETS else name for name in asked if name not in paths]
    for name, path in paths.items():
        if not path.exists():
            raise RequestError(
                f"evaluate.tasks names {name}, which does not exist. Name a folder of YAML tasks, a YAML file, or a "
                "task or group of lm-evaluation-harness."
            )
    folders = [path if path.is_dir() else path.parent for path in paths.values()]
    # All that the harness has takes ten seconds to read; mostly the folders of what is asked for are enough.
    named = _named(TaskManager(include_defaults=False, include_path=[*_homes(plain), *folders]), asked, paths)
    if named is None:
        named = _named(TaskManager(include_path=folders or None), asked, paths, whole=True)
    assert named is not None
    for name in asked:
        if name in PRESETS:
            of, changes = PRESETS[name]
            named.put(name, of, {"task": name, **changes}, scratch)
    return named


def _is_path(name: str) -> bool:
    return "/" in name or name.endswith((".yaml", ".yml")) or any(Path(name).glob("*.yaml"))


def _homes(names: Sequence[str]) -> list[Path]:
    """Folders of the harness with a file that defines one of the names."""
    if not names:
        return []
    pattern = re.compile(rb"^(?:task|group):\s*['\"]?(?:%s)['\"]?\s*$" % "|".join(map(re.escape, names)).encode(), re.M)
    return sorted({path.parent for path in _HARNESS.rglob("*.yaml") if pattern.search(path.read_bytes())})


def _named(manager: Any, asked: Sequence[str], paths: Mapping[str, Path], *, whole: bool = False) -> Named | None:
    """None where the index lacks something that a whole one might have."""
    names: list[str] = []
    for name in asked:
        if name in paths:
            names += _in_path(paths[name], manager.task_index)
        elif (PRESETS[name][0] if name in PRESETS else name) in manager.task_index:
            names.append(name)
        elif not whole:
            return None
        else:
            near = difflib.get_close_matches(name, [*manager.all_tasks, *PRESETS], n=5, cutoff=0.5)
            raise RequestError(
                f"evaluate.tasks names {name}, which lm-evaluation-harness does not know"
                f"{'. Near it are ' + ', '.join(near) if near else ''}. `lm-eval ls tasks` lists them all; a folder "
                "or file of your own tasks is named by its path."
            )
    incomplete = not whole and any(
        leaf not in manager.task_index or len(groups) > len(set(groups) & _groups(manager.task_index))
        for name in names
        for leaf, groups in _leaves(PRESETS[name][0] if name in PRESETS else name, manager.task_index, ())
    )
    return None if incomplete else Named(manager, list(dict.fromkeys(names)))


def _groups(index: Index) -> set[str]:
    """Tags are no groups: who bears one is known of the whole harness alone."""
    return {name for name, entry in index.items() if entry.kind.name == "GROUP"}


def _in_path(path: Path, index: Index) -> list[str]:
    """Groups that the files define, and tasks that are in none of these."""
    from lm_eval.tasks._yaml_loader import load_yaml

    files = sorted(path.rglob("*.yaml")) if path.is_dir() else [path]
    by_file = {
        entry.yaml_path.resolve(): name
        for name, entry in index.items()
        if entry.yaml_path is not None and entry.kind.name != "TAG"
    }
    found = []
    for file in files:
        if (name := by_file.get(file.resolve())) is not None:
            found.append(name)
            continue
        try:
            content = load_yaml(file, resolve_func=False)
        except Exception as error:  # of YAML, of an include that isn't there
            raise RequestError(f"{file} in evaluate.tasks can't be read: {error}") from None
        if defined := content.get("task" if isinstance(content.get("task"), str) else "group"):
            raise RequestError(f"{file} defines {defined}, which another file of {path} defines too. Rename one.")
        if path == file:
            raise RequestError(f"{file} in evaluate.tasks names no task: it has neither `task:` nor `group:`.")
    if not found:
        raise RequestError(f"{path} in evaluate.tasks has no *.yaml file with a `task:` or `group:`.")
    groups = [name for name in found if index[name].kind.name == "GROUP"]
    inside = {inner for group in groups for leaf, way in _leaves(group, index, ()) for inner in (leaf, *way[:-1])}
    return [name for name in found if name not in inside]


def _leaves(name: str, index: Index, above: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(task, groups and tags it is reached by, nearest first); a name without an entry counts as a task."""
    entry = index.get(name)
    kind = entry.kind.name if entry is not None else "TASK"
    if kind not in ("GROUP", "TAG") or name in above:
        yield name, above
        return
    assert entry is not None
    members = sorted(entry.tags) if kind == "TAG" else (entry.cfg or {}).get("task") or []
    for member in members if isinstance(members, list) else [members]:
        inner = member if isinstance(member, str) else member.get("group") or member.get("task")
        yield from _leaves(inner, index, (name, *above))
