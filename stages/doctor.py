"""`refcache doctor`: what is wrong with this machine, and what mends it."""

import json
from pathlib import Path

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="A list of {name, state, found, mend} instead of lines.")
@click.option("--hub", is_flag=True, help="Also ask whether the Hugging Face hub answers.")
@click.pass_context
def command(ctx: click.Context, as_json: bool, hub: bool) -> None:
    """Check this machine and the project in the working folder, and say what mends it.

    Each line is ok, a warning or broken, with the command to run below it. The exit code is 1 if something is broken.
    Takes some seconds, for torch and vLLM are started to see their device.

    \b
    Example:
      refcache doctor
    """
    from pipeline.project.doctor import examine

    found = []
    for check in examine(Path.cwd(), ask_hub=hub):
        found.append(check)
        if not as_json:
            click.echo(f"{check.state:8} {check.name}: {check.found}")
            if check.mend:
                click.echo(f"{'':8}   {check.mend}")
    if as_json:
        click.echo(json.dumps([check._asdict() for check in found], indent=1))
    if any(check.state == "broken" for check in found):
        ctx.exit(1)
