"""Read params.yaml, apply --set, validate; every error names file, key, value and what is allowed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.errors import RequestError
from pipeline.params import Params, variant_loop

# ruamel reads YAML 1.2, as DVC does; PyYAML would take 1e-6 for a string.
_yaml = YAML(typ="safe", pure=True)


def load_params(file: Path, overrides: Sequence[str] = ()) -> Params:
    """The validated parameters of `file` with `overrides` ("section.key=value", values in YAML) applied.

    Raises RequestError for a missing file, broken YAML, an unknown key, a wrong type or a value out of range.
    """
    if not file.is_file():
        raise RequestError(f"{file} does not exist. Run from the project's folder, or name a file with --params.")
    try:
        raw = _yaml.load(file.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError) as error:
        raise RequestError(f"{file} is not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise RequestError(f"{file} must hold sections (model, prepare, ...), found {type(raw).__name__}.")
    for override in overrides:
        _apply(raw, override)
    try:
        params = Params.model_validate(raw)
        for name in params.train.variants:
            variant_loop(params.train, name)
    except ValidationError as error:
        raise RequestError(_readable(file, error)) from None
    except ValueError as error:  # of a variant's settings
        raise RequestError(f"{file}: {error}") from None
    return params


def _apply(raw: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    *parents, key = path.split(".")
    if not equals or not key:
        raise RequestError(f"--set {override!r}: expected section.key=value, for example train.learning_rate=1e-5")
    node = raw
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise RequestError(f"--set {override!r}: {parent} holds {child!r}, not a section")
        node = child
    node[key] = _yaml.load(text) if text else None


def _readable(file: Path, error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    lines = [f"{file} has {len(problems)} problem{'s' if len(problems) > 1 else ''}; nothing was run:"]
    for problem in problems:
        key = ".".join(str(part) for part in problem["loc"]) or "(whole file)"
        if problem["type"] == "extra_forbidden":
            lines.append(f"  {key}: unknown key (value {problem['input']!r}); misspelt?")
        elif problem["type"] == "missing":
            lines.append(f"  {key}: missing")
        elif problem["type"] == "value_error":
            lines.append(f"  {key}: {problem['ctx']['error']}")
        else:
            lines.append(f"  {key}: {problem['msg']}, found {problem['input']!r}")
    return "\n".join(lines)
