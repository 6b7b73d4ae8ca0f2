"""`python -m studies NAME`: the studies that need no pipeline. studies/dvc.yaml runs them."""

from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import click

from studies.pages.settings import load_section


@click.group()
def main() -> None:
    """Run one study and write its page and figure.

    \b
    Example:
      python -m studies toy --page docs/studies/toy.md --figure docs/studies/toy.svg
    """


def study_options(function: Callable[..., Any]) -> Callable[..., Any]:
    path = click.Path(path_type=Path)
    function = click.option("--figure", type=path, required=True, help="SVG figure to write.")(function)
    function = click.option("--page", type=path, required=True, help="Markdown page to write.")(function)
    file = click.Path(path_type=Path, exists=True, dir_okay=False)
    return click.option(
        "--params", "file", type=file, default=Path("studies/params.yaml"), show_default=True, help="Sizes, objectives."
    )(function)


@main.command()
@study_options
def landscapes(file: Path, page: Path, figure: Path) -> None:
    """Loss landscapes over the probabilities of a chosen and a rejected response."""
    from studies.landscapes.page import write
    from studies.landscapes.survey import LandscapeParams, survey

    started = perf_counter()
    params = load_section(file, "landscapes", LandscapeParams)
    surveys = {name: survey(v, params.reference, params.grid) for name, v in params.objectives.items()}
    write(params, surveys, page, figure)
    click.echo(f"{len(surveys)} landscapes in {perf_counter() - started:.0f} s: {page}, {figure}")


@main.command()
@study_options
def toy(file: Path, page: Path, figure: Path) -> None:
    """Where objectives move probability: four prompts, four responses, a small network, many seeds."""
    from studies.toy.networks import ToyParams, run
    from studies.toy.page import write

    started = perf_counter()
    params = load_section(file, "toy", ToyParams)
    runs = run(params)
    write(params, runs, page, figure)
    click.echo(f"{len(runs)} x {params.seeds} networks in {perf_counter() - started:.0f} s: {page}, {figure}")


@main.command()
@study_options
def misspecification(file: Path, page: Path, figure: Path) -> None:
    """A contextual bandit whose policy can't represent the reward: DPO, AuxDPO, and sketched constraints."""
    from studies.misspecification.page import write
    from studies.misspecification.worlds import MisspecificationParams, run

    started = perf_counter()
    params = load_section(file, "misspecification", MisspecificationParams)
    write(params, run(params), page, figure)
    click.echo(f"{params.worlds} worlds in {perf_counter() - started:.0f} s: {page}, {figure}")


if __name__ == "__main__":
    main()
