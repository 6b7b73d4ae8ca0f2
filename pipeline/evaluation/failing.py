"""Cells that fail without taking others with them."""

import sys

from cache import CacheError
from pipeline.errors import RequestError, RunFailed


class Failing:
    """A context that records what a cell failed of, and goes on."""

    def __init__(self, name: str, failed: dict[str, Exception]) -> None:
        self._name, self._failed = name, failed

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *at: object) -> bool:
        if isinstance(error, RequestError | RunFailed | CacheError):
            self._failed.setdefault(self._name, error)
            print(f"{self._name} failed: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
            return True
        return False
