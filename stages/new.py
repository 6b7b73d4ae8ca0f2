"""`refcache new`: a project of one's own."""

from pathlib import Path

import click

from stages.options import LocalPath


@click.command()
@click.argument("folder", metavar="DIR", type=LocalPath(), required=False)
@click.option("--preset", default="demo", show_default=True, metavar="NAME", help="The params.yaml to start with.")
@click.option("--list", "listing", is_flag=True, help="Name the presets, and write nothing.")
def command(folder: Path | None, preset: str, listing: bool) -> None:
    """Write a project into DIR, where `dvc repro` runs the pipeline.

    DIR is made, and becomes a git repository unless it lies in one. No file that is there is overwritten.

    \b
    Example:
      refcache new my-project
      cd my-project && dvc repro
    """
    from pipeline.project.sources import presets

    if listing:
        for name, purpose in presets().items():
            click.echo(f"{name}: {purpose}")
        return
    if folder is None:
        raise click.UsageError("Missing argument 'DIR': the folder to write, for example `refcache new my-project`.")
    from pipeline.project.writing import new_project

    written = new_project(folder, preset)
    click.echo(f"Wrote {len(written)} files into {folder}: {', '.join(written)}")
    click.echo(f"Now: cd {folder} && git add . && dvc repro")
