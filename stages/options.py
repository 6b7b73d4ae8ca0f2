"""Options that several commands share."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click


class LocalPath(click.Path):
    """A path that is none in object storage, which would be taken for a folder of that name."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if "://" in str(value):
            self.fail(
                f"{value} is in object storage, and this wants a path on this machine. `refcache inspect` reads a "
                "reference cache in place; for all else `dvc pull` it, or copy it here (docs/sharing.md).",
                param,
                ctx,
            )
        return super().convert(value, param, ctx)


def path_option(name: str, text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A required path that DVC also knows, as a dependency or an output of the stage."""
    return click.option(name, type=LocalPath(), required=True, help=text)


def default_path_option(name: str, default: str, text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A path with the place where the pipeline puts it as default, for commands that people type."""
    return click.option(name, type=LocalPath(), default=Path(default), show_default=True, help=text)


def trust_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """What model.trust_remote_code says, for commands that read no parameters."""
    text = "Run the Python code that comes with the model or tokenizer, as model.trust_remote_code."
    return click.option("--trust-remote-code", is_flag=True, help=text)(function)


def params_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --params and --set, and call `function` with the validated file as `params`."""

    @params_file_options
    @wraps(function)
    def with_params(*, params_file: Path, overrides: tuple[str, ...], **options: Any) -> Any:
        from pipeline.params import load_params

        return function(params=load_params(params_file, overrides), **options)

    return with_params


def params_file_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --params and --set as `params_file` and `overrides`, for commands that need parameters only sometimes."""
    file = click.option(
        "--params",
        "params_file",
        type=click.Path(path_type=Path),
        default=Path("params.yaml"),
        show_default=True,
        help="Hyper-parameters.",
    )
    overrides = click.option(
        "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override one value; repeatable."
    )
    return file(overrides(function))
