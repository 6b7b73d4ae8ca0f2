"""`python -m stages COMMAND` and the console script `refcache COMMAND`: one click group, loaded lazily."""

import importlib
import sys
from copy import copy
from pathlib import Path
from typing import Any

import click

# name -> line in the group's help; each lives in stages/<name>.py as `command`, imported only when it runs.
COMMANDS = {
    "new": "Write a project of one's own, for `dvc repro`.",
    "doctor": "Check this machine and say what mends it.",
    "prepare": "Read preference data; tokenise, split and key it.",
    "suites": "Tokenise and key the pair sets that policies are judged by.",
    "sft": "Fine-tune (or take as it is) the reference model.",
    "sample": "Make pairs of the reference's own answers.",
    "score": "Score every response under the reference with vLLM.",
    "sketch": "Sketch the reference's gradient of every training response.",
    "constraint": "Say which sketches a variant trains with, for DVC.",
    "train": "Train one policy against the reference cache with DeepSpeed.",
    "evaluate": "Compare policies with the reference on held-out pairs.",
    "report": "Collect all variants into tables, curves and one HTML page.",
    "export": "Write pairs with their reference log-probs for other trainers.",
    "inspect": "Show what a reference cache holds.",
    "browse": "Write pairs and their token log-probs as pages to look through.",
    "sketch-report": "Say whether the sketches are large enough.",
    "verify": "Check a reference cache for damage, and repair it.",
    "why-miss": "Say which rows `score` or `sketch` would compute, and why.",
    "gc": "Drop journalled rows that no current pair uses.",
}


# Those of dvc.yaml, which write what a project keeps.
OF_DVC = {"prepare", "suites", "sft", "sample", "score", "sketch", "constraint", "train", "evaluate", "report"}


class StageGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"stages.{cmd_name.replace('-', '_')}").command
        assert isinstance(command, click.Command)
        return _of_one_version(command) if cmd_name in OF_DVC else command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # click would import every command for its help line, and with it seconds of pydantic and pyarrow.
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.exceptions.Abort):
            raise  # click's own, RuntimeErrors both
        except (ValueError, RuntimeError) as error:
            code = exit_code(error)
            if code is None:
                raise
            click.echo(f"Error: {error}", err=True)
            ctx.exit(code)


def _of_one_version(command: click.Command) -> click.Command:
    """`command`, which runs only where the project in the working folder is one for this version of refcache."""
    callback = command.callback
    assert callback is not None

    def checked(*arguments: Any, **options: Any) -> Any:
        from pipeline.project.version import check_version

        check_version(Path.cwd())
        return callback(*arguments, **options)

    command = copy(command)
    command.callback = checked
    return command


def exit_code(error: Exception) -> int | None:
    """2 for a wrong request, 1 for a run that failed; None for what is a fault of ours and keeps its traceback."""
    from cache import CacheError, CacheIncomplete, CacheMismatch
    from pipeline.errors import RequestError, RunFailed

    if isinstance(error, RequestError | CacheMismatch | CacheIncomplete):
        return 2
    if isinstance(error, RunFailed | CacheError):
        return 1
    return None


@click.group(cls=StageGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="refcache")
def main() -> None:
    """Score the reference once, train many policies against it.

    Phase 1 is prepare, suites, sft, score and sketch; phase 2 is train, evaluate and report. `dvc repro` runs them
    all; each also runs alone. Hyper-parameters come from params.yaml.

    \b
    Example:
      refcache score --pairs data/prepared/pairs --model models/reference \\
        --out data/reference/logps --metrics results/score/metrics.json
      refcache inspect data/reference/logps
    """


if __name__ == "__main__":
    from refcache.packages import ForeignPackage, check_packages

    try:
        check_packages()  # `python -m` looks into the working folder first
    except ForeignPackage as foreign:
        print(f"Error: {foreign}", file=sys.stderr)
        sys.exit(2)
    sys.exit(main(prog_name="refcache"))
