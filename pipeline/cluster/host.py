"""What an actor is: a process on a node that owns one worker and says how its methods ended. No Ray in here.

The worker of scoring is an EngineProcess, so that the engine's crash is not the actor's and its log lies on its node.
"""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.cluster.same_software import software
from pipeline.errors import EngineFailed, RequestError, RunFailed
from pipeline.model.digests import config_digest, weights_digest

_ERRORS = {kind.__name__: kind for kind in (EngineFailed, RequestError, RunFailed)}


class Facts(NamedTuple):
    """Of an actor's process. signature: names, sizes and times of the model's files; empty without the folder."""

    host: str
    pid: int
    software: dict[str, str]
    signature: tuple[tuple[str, int, int], ...]


class Failure(NamedTuple):
    """How a method ended, if not with an answer: an error of pipeline.errors, by name since Ray would wrap it."""

    kind: str
    message: str

    def error(self, where: str) -> Exception:
        return _ERRORS[self.kind](f"{where}: {self.message}")


class Host:
    """The actor's class. Methods return what was asked for, or a Failure; other errors are faults of ours."""

    def __init__(self, environment: dict[str, str]) -> None:
        """environment: variables that the worker is to see as the stage sees them."""
        os.environ.update(environment)
        self._worker: Any = None
        self._done = (0, 0)

    def facts(self, model: Path) -> Facts:
        files = sorted(file for file in model.glob("*") if file.is_file()) if model.is_dir() else []
        states = [(file.name, file.stat()) for file in files]
        signature = tuple((name, state.st_size, state.st_mtime_ns) for name, state in states)
        return Facts(socket.gethostname(), os.getpid(), software(), signature)

    def digests(self, model: Path) -> Any:
        """Of "weights" and "config", as in the identity."""
        return _outcome(lambda: {"weights": weights_digest(model), "config": config_digest(model)})

    def start(self, make: Callable[..., Any], *arguments: Any) -> Any:
        """Make the worker; returns None."""

        def make_it() -> None:
            self._worker = make(*arguments)

        return _outcome(make_it)

    def ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        """The worker's answer; it may say by `on_progress(rows, tokens)` how far it is."""
        self._done = (0, 0)
        return _outcome(lambda: getattr(self._worker, method)(*arguments, **options, on_progress=self._advance))

    def _advance(self, rows: int, tokens: int = 0, /) -> None:
        self._done = (self._done[0] + rows, self._done[1] + tokens)

    def progress(self) -> tuple[int, int]:
        """Rows and tokens of the question under way; answers also while it is."""
        return self._done


def _outcome(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except tuple(_ERRORS.values()) as error:
        kind = next(name for name, known in _ERRORS.items() if isinstance(error, known))
        return Failure(kind, str(error))
