"""Read one section of a study's params.yaml."""

from pathlib import Path
from typing import TypeVar

import click
from pydantic import BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML


class Section(BaseModel):
    """Strict, as the pipeline's own sections: an unknown key or a wrong type is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


S = TypeVar("S", bound=Section)


def load_section(file: Path, name: str, model: type[S]) -> S:
    """Section `name` of `file` as `model`. click.UsageError (exit 2) says what is wrong with it."""
    raw = YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8"))
    if name not in raw:
        raise click.UsageError(f"{file} has no section {name}; it has {', '.join(raw)}")
    try:
        return model.model_validate(raw[name])
    except ValidationError as error:
        raise click.UsageError(f"{file}, section {name}: {error}") from None
