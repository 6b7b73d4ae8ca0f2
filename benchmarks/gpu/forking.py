"""Parts of the dry run as forks of one process that has everything imported, which takes longer than all they do."""

import contextlib
import importlib
import os
import runpy
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from typing import BinaryIO

IMPORTED = ("torch", "peft", "transformers.models.qwen2", "deepspeed", "pipeline.training.preference_task")
PERHAPS = ("pytest", "hypothesis", "trl.trainer.dpo_trainer")


def import_all() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    for name in PERHAPS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


class Fork:
    """As much of subprocess.Popen as the suite uses; command: `-m MODULE ARGUMENTS`."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], log: BinaryIO) -> None:
        readable, writable = os.pipe()
        sys.stdout.flush()
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            os._exit(_run(command, environment, writable, log))
        with contextlib.suppress(OSError):  # so that it is a group before anybody ends that, whoever comes first
            os.setpgid(self.pid, self.pid)
        os.close(writable)
        self.stdout = os.fdopen(readable, "rb")

    def wait(self, timeout: float) -> int:
        """The exit status, negative for a signal. Raises subprocess.TimeoutExpired."""
        deadline = time.monotonic() + timeout
        while self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a fork", timeout)
            else:
                time.sleep(0.02)
        return self.returncode


def _run(command: Sequence[str], environment: dict[str, str], writable: int, log: BinaryIO) -> int:
    try:
        os.setpgid(0, 0)
        os.dup2(writable, 1)
        os.dup2(log.fileno(), 2)
        os.environ.update(environment)
        sys.argv = list(command[1:])
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        return 0
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
