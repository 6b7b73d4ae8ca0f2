"""An actor as the stage sees it: blocking questions to a process on a node, whose death is EngineFailed."""

import time
from contextlib import suppress
from functools import cache
from typing import Any

from pipeline.cluster.host import Failure, Host
from pipeline.errors import EngineFailed
from pipeline.progress import Advance

START_SECONDS = 300.0  # for a worker of Ray to start and import this package, on a busy node
LOOK_SECONDS = 2.0  # between two looks at how far a question is
WATCH = "watch"  # the group of methods that answer while another one works


class Actor:
    """where: its node, for messages."""

    def __init__(self, group: Any, variables: dict[str, str]) -> None:
        """Start it in that placement group; returns at once. variables: of its environment."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundle = group.bundle_specs[0]
        self.where = "a node"
        self._handle: Any = (
            _actor_class()
            .options(
                num_cpus=bundle.get("CPU", 0),
                num_gpus=bundle.get("GPU", 0),
                max_restarts=0,  # its successor is the pool's to start, and to load
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, 0),
            )
            .remote(variables)
        )

    def begin(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of Host; what comes back is for `result`."""
        return getattr(self._handle, method).remote(*arguments, **options)

    def ask(self, method: str, *arguments: Any, silence: float | None) -> Any:
        """As `outcome`, raising what failed there."""
        return self.answer(self.outcome(method, *arguments, silence=silence))

    def answer(self, outcome: Any) -> Any:
        if isinstance(outcome, Failure):
            raise outcome.error(self.where)
        return outcome

    def outcome(self, method: str, *arguments: Any, silence: float | None) -> Any:
        return self.result(self.begin(method, *arguments), silence=silence)

    def result(self, begun: Any, *, silence: float | None, advance: Advance | None = None) -> Any:
        """Wait for it; silence: at most so many seconds without a sign of life of the process, None: for ever.

        Raises EngineFailed where the actor or its node dies.
        """
        import ray
        from ray.exceptions import GetTimeoutError, RayError, RayTaskError

        told, heard = (0, 0), time.monotonic()
        try:
            while not ray.wait([begun], timeout=LOOK_SECONDS)[0]:
                with suppress(GetTimeoutError):
                    watch = self._handle.progress.options(concurrency_group=WATCH).remote()
                    done = ray.get(watch, timeout=LOOK_SECONDS)
                    heard = time.monotonic()
                    if advance is not None and done != told:
                        advance(done[0] - told[0], done[1] - told[1])
                        told = done
                if silence is not None and time.monotonic() - heard > silence:
                    raise EngineFailed(f"An actor on {self.where} gave no sign of life for {silence:.0f} s.")
            return ray.get(begun)
        except RayTaskError as error:
            cause = error.cause
            raise EngineFailed(f"An actor on {self.where} failed: {type(cause).__name__}: {cause}\n{error}") from None
        except RayError as error:
            raise EngineFailed(f"An actor on {self.where} died: {_reason(error)}") from None

    def kill(self) -> None:
        import ray

        with suppress(Exception):  # it is dead, or its cluster is
            ray.kill(self._handle)


@cache
def _actor_class() -> Any:
    import ray

    return ray.remote(concurrency_groups={WATCH: 1})(Host)


def _reason(error: Exception) -> str:
    """The one line of Ray's that says why, without its guesses."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("The actor is dead because", "The actor died because"))]
    line = (told or lines or [type(error).__name__])[0]
    return line.partition(" Some common causes include")[0]
