"""Whether final answers are equal, asked of math-verify in a process that may die of one."""

import importlib.util
import json
import subprocess
import sys
from types import TracebackType
from typing import Self

from pipeline.children import same_path_environment
from pipeline.errors import RequestError, RunFailed
from pipeline.sampled.math_worker import READY, SECONDS


def need_math_verify() -> None:
    """Raise RequestError where math-verify is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise RequestError(
            "sample.scorer: math compares answers with the package math-verify, which is not installed; nothing was "
            "scored. Run: pip install -e .[sample]"
        )


class MathEquality:
    """A context manager; its process starts with the first question (about a second), and anew after a death."""

    def __init__(self, *, seconds: int = SECONDS) -> None:
        """seconds: for one comparison; ordinary ones take milliseconds."""
        self._seconds = seconds
        self._process: subprocess.Popen[str] | None = None
        self._known: dict[tuple[str, str], bool] = {}

    def __call__(self, answer: str, reference: str) -> bool:
        """Whether two final answers are equal; not, where the comparison takes too long or too much memory.

        Raises RunFailed where math-verify can't be started.
        """
        if answer == reference:  # words too, which math-verify reads as no answer
            return True
        asked = (answer, reference)
        if asked not in self._known:
            self._known[asked] = self._ask(asked)
        return self._known[asked]

    def _ask(self, asked: tuple[str, str]) -> bool:
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
        said = process.stdout.readline()
        if not said:
            self._stop()
        return said == "true\n"

    def _start(self) -> subprocess.Popen[str]:
        process = self._process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.sampled.math_worker", str(self._seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=same_path_environment() | {"PYTHONIOENCODING": "utf-8"},
        )
        assert process.stdout is not None
        if process.stdout.readline() != READY:
            self._stop()
            raise RunFailed(
                f"math-verify could not be loaded: its process ended with code {process.returncode} and said why "
                "above. Run: pip install -e .[sample]"
            )
        return process

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()  # it keeps nothing
            process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
