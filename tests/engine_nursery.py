"""Engine processes by fork from one that has vLLM imported: `python -m tests.engine_nursery SOCKET`.

vLLM's imports take seven seconds and more of each engine's start; most tests of engines are about what comes after.
Everything else is real: server.py, the pipe, the log, a process group of the engine's own, its end. Starts by command
line, and engines that die with their stage, are in tests/pipeline/engine/test_process.py and the kills of dvc.

SOCKET carries one request an engine: its environment, and descriptors of its pipe, its log, and a pipe that gets its
pid and, when it has ended, its status. Several processes may use one socket, and each may be killed at any time.
"""

import array
import atexit
import contextlib
import functools
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

from pipeline.engine.environment import engine_environment
from pipeline.params import ScoreParams
from tests import ROOT

NUMBER = struct.Struct("i")
LONGEST = 1 << 18  # bytes of a request: a whole environment


class ForkedEngine:
    """As much of subprocess.Popen as EngineProcess uses."""

    def __init__(self, told: int) -> None:
        self._told = told
        self.pid = self._next()
        self._code: int | None = None

    def _next(self) -> int:
        return NUMBER.unpack(os.read(self._told, NUMBER.size))[0]

    def poll(self) -> int | None:
        if self._code is None and select.select([self._told], [], [], 0)[0]:
            self.wait()
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        if self._code is None:
            if not select.select([self._told], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("engine", timeout or 0)
            self._code = os.waitstatus_to_exitcode(self._next())
            os.close(self._told)
        return self._code


class Engines:
    """Takes the place of process.start_server; the nursery ends when nobody holds this end of its socket any more."""

    def __init__(self, ours: socket.socket) -> None:
        self.socket = ours

    def start_server(self, pipe: int, log: Path, environment: dict[str, str]) -> ForkedEngine:
        told, tell = os.pipe()
        with log.open("ab") as output:
            descriptors = array.array("i", [pipe, output.fileno(), tell])
            request = json.dumps({"environment": environment, "folder": os.getcwd()}).encode()
            self.socket.sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
        os.close(tell)
        return ForkedEngine(told)


@functools.cache
def engines() -> Engines:
    """The nursery of this process, started by the first call."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LONGEST)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.engine_nursery", str(theirs.fileno())],
        cwd=ROOT,
        env=engine_environment(ScoreParams(enforce_eager=True)) | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
    )
    theirs.close()
    atexit.register(process.kill)
    return Engines(ours)


def become_engine(request: bytes, pipe: int, output: int) -> None:
    from pipeline.engine import server

    order = json.loads(request)
    os.setsid()
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["server", str(pipe), str(os.getppid())]
    server.main()


def keep(request: bytes, pipe: int, output: int, tell: int) -> None:
    """In a fork: start an engine by another one, and say how it ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if (pid := os.fork()) == 0:
        os.close(tell)
        try:
            become_engine(request, pipe, output)
        finally:
            os._exit(1)
    os.close(pipe)  # else the stage would not see the end of the engine's side
    os.write(tell, NUMBER.pack(pid))
    status = os.waitpid(pid, 0)[1]
    with contextlib.suppress(BrokenPipeError):  # nobody waits for it where the stage was killed
        os.write(tell, NUMBER.pack(status))


def main() -> None:
    from vllm.model_executor.models import registry

    import pipeline.engine.vllm_engine  # noqa: F401

    # Where a class of models was not looked at on this machine before, vLLM starts a process to import it: seven
    # seconds each. Its own process imports the class anyway.
    registry._run_in_subprocess = lambda look: look()
    requests = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are not waited for
    while True:
        request, descriptors, _, _ = socket.recv_fds(requests, LONGEST, 3)
        if not descriptors:
            return
        if os.fork() == 0:
            requests.close()
            keep(request, *descriptors)
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)


if __name__ == "__main__":
    main()
