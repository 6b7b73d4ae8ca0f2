"""The engine's process: `python -m pipeline.engine.server PIPE_FD STAGE_PID`, started by process.py.

It lives for one stage and dies with it, however the stage dies: DVC leaves orphans, and an orphan would keep the
accelerator's memory from its successor.
"""

import ctypes
import os
import signal
import sys
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection

CPUS = "REFCACHE_ENGINE_CPUS"  # in the environment: numbers of the cores to keep to, "0,1,2"; absent: all
_PR_SET_PDEATHSIG = 1


def main() -> None:
    pipe, stage_pid = Connection(int(sys.argv[1])), int(sys.argv[2])
    _die_with(stage_pid)
    if cpus := os.environ.get(CPUS):
        # Before torch and vLLM are imported, which take as many threads as there are cores to use.
        os.sched_setaffinity(0, map(int, cpus.split(",")))
    try:
        _serve(pipe)
    except EOFError:
        pass  # the stage is gone
    except BaseException as error:
        traceback.print_exc()
        with suppress(OSError):
            pipe.send(("error", f"{type(error).__name__}: {error}"))
    sys.stdout.flush()
    sys.stderr.flush()
    # Interpreter shutdown of torch and vLLM takes seconds, and nothing of theirs needs it; workers of tensor
    # parallelism notice that their pipe to this process has closed.
    os._exit(0)


def _serve(pipe: Connection) -> None:
    """Import vLLM at once, build the engine from the first message, then answer requests until None."""
    from pipeline.engine.vllm_engine import VLLMEngine, on_cpu

    pipe.send(("answer", on_cpu()))
    if (settings := pipe.recv()) is None:
        return
    engine = VLLMEngine(**settings)

    def report(rows: int, tokens: int) -> None:
        pipe.send(("progress", (rows, tokens)))

    pipe.send(("answer", None))
    while (request := pipe.recv()) is not None:
        method, arguments, options = request
        pipe.send(("answer", getattr(engine, method)(*arguments, report, **options)))


def _die_with(stage_pid: int) -> None:
    """Be killed when the stage dies, or the thread of it that started us (Linux).

    Elsewhere the end of the pipe ends us, after the call under way.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != stage_pid:  # it died before the line above
        os._exit(1)


if __name__ == "__main__":
    main()
