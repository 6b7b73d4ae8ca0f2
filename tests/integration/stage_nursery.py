"""Score stages by fork, killed at chosen moments: `python -m tests.integration.stage_nursery [ENGINES]`.

A stage's imports take six seconds; this process has them loaded and forks a stage for every line of JSON on its
standard input: `{"arguments", "environment", "output", "moments"}`. It answers with two lines: the stage's pid, and the
status that os.waitpid gave for it. All that a stage does is real; a moment is [what, n], at which it or its engine gets
SIGKILL (or SIGSTOP) in earnest. ENGINES: descriptor of a socket to tests/engine_nursery.py, where engines come from.
"""

import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch  # noqa: F401
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: F401

from cache import Journal, response_key
from pipeline.engine import process
from pipeline.engine.process import EngineProcess
from pipeline.params import ScoreParams
from pipeline.reference import scoring
from stages.__main__ import exit_code
from tests.engine_nursery import Engines

UNEXPECTED = 3  # exit code of a stage that failed in no foreseen way
APPENDED_BYTES = 200  # at least, for a write that is an append to the journal and not a lock file's


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Countdown:
    def __init__(self, n: int) -> None:
        self.left = n

    def reached(self, *_: Any) -> bool:
        self.left -= 1
        return self.left == 0


Look = Callable[..., Any]


def wrap(owner: Any, name: str, before: Look | None = None, after: Look | None = None) -> None:
    original = getattr(owner, name)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        if before is not None:
            before(*arguments)
        result = original(*arguments, **options)
        if after is not None:
            after(*arguments)
        return result

    setattr(owner, name, wrapped)


def stage_before_append(n: int) -> None:
    countdown = Countdown(n)
    wrap(Journal, "append", before=lambda *_: countdown.reached() and die())


def stage_after_append(n: int) -> None:
    countdown = Countdown(n)
    wrap(Journal, "append", after=lambda *_: countdown.reached() and die())


def stage_terminated_after_append(n: int) -> None:
    """By SIGTERM, which a stage answers."""
    countdown = Countdown(n)
    wrap(Journal, "append", after=lambda *_: countdown.reached() and os.kill(os.getpid(), signal.SIGTERM))


def stage_in_append(n: int) -> None:
    """With half of the frame written."""
    countdown, write = Countdown(n), os.pwrite

    def write_half(file: int, data: Any, position: int) -> None:
        if len(data) > APPENDED_BYTES and countdown.reached():
            write(file, data[: len(data) // 2], position)
            die()

    wrap(os, "pwrite", before=write_half)


def stage_in_load(n: int) -> None:
    """1: before the engine is asked to load; 2: when it has loaded."""
    wrap(EngineProcess, "load", **{"before" if n == 1 else "after": lambda *_: die()})


def stage_in_publication(n: int) -> None:
    """Just before change n to the published folder."""

    def arm(*_: Any) -> None:
        countdown = Countdown(n)
        for name in ("replace", "unlink", "fsync"):
            wrap(os, name, before=lambda *_: countdown.reached() and die())

    wrap(scoring, "publish_needed", before=arm)


def engine_before_call(n: int) -> None:
    """Calls are counted over all engines of the run."""
    countdown = Countdown(n)
    wrap(EngineProcess, "score", before=lambda engine, *_: countdown.reached() and os.kill(engine.pid, signal.SIGKILL))


def engine_in_call(n: int) -> None:
    """When it reports its first row."""
    countdown, score = Countdown(n), EngineProcess.score

    def score_and_kill(engine: EngineProcess, rows: Any, advance: Any) -> Any:
        doomed = countdown.reached()

        def advance_and_kill(rows: int, tokens: int = 0, /) -> None:
            if doomed:
                os.kill(engine.pid, signal.SIGKILL)
            advance(rows, tokens)

        return score(engine, rows, advance_and_kill)

    EngineProcess.score = score_and_kill  # type: ignore[method-assign]


def engine_at_row(key: str) -> None:
    """Whenever the row of that key is in a call: killed the first time, stopped the second, killed the third."""
    hang = Countdown(2)

    def end(engine: EngineProcess, rows: Any, *_: Any) -> None:
        if key not in {response_key(*row).hex() for row in rows}:
            return
        if hang.reached():
            engine._params = engine._params.model_copy(update={"timeout_seconds": 1})
            os.kill(engine.pid, signal.SIGSTOP)
        else:
            os.kill(engine.pid, signal.SIGKILL)

    wrap(EngineProcess, "score", before=end)


def run(order: dict[str, Any]) -> int:
    """In the forked child: be the stage; returns the exit code that the command would have."""
    os.environ.update(order["environment"])
    for name, n in order["moments"]:
        globals()[name](n)
    pairs, model, out, metrics = map(Path, order["arguments"][:4])
    params = ScoreParams.model_validate(order["arguments"][4])
    try:
        scoring.score_responses(
            pairs=pairs, model=model, out=out, metrics=metrics, params=params, trainer_dtype="float32"
        )
    except Exception as error:
        print(f"Error: {error}", file=sys.stderr, flush=True)
        return exit_code(error) or UNEXPECTED
    return 0


def main() -> None:
    if sys.argv[1:]:
        process.start_server = Engines(socket.socket(fileno=int(sys.argv[1]))).start_server  # type: ignore[assignment]
    for line in sys.stdin:
        order = json.loads(line)
        if (pid := os.fork()) == 0:
            output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            os.dup2(output, 1)
            os.dup2(output, 2)
            code = UNEXPECTED
            try:
                code = run(order)
            except SystemExit as left:
                code = left.code if isinstance(left.code, int) else UNEXPECTED
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)


if __name__ == "__main__":
    main()
