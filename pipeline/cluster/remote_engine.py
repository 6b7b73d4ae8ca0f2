"""An engine on a node of the cluster, with the face of pipeline.engine.process.EngineProcess as scoring uses it."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.cluster.actor import Actor
from pipeline.cluster.engine_worker import EngineWorker
from pipeline.cluster.packed import pack_rows, unpack_scored
from pipeline.cluster.session import RaySession
from pipeline.engine.process import Scored
from pipeline.engine.rows import EngineLength, Row
from pipeline.errors import EngineFailed
from pipeline.params import ScoreParams
from pipeline.progress import Advance

CLOSE_SECONDS = 15.0


class RemoteEngine:
    """Every method waits for its answer; after EngineFailed the actor is gone. log: may lie on another machine."""

    def __init__(self, session: RaySession, index: int, params: ScoreParams, *, log: Path) -> None:
        """Start the process of worker `index` of `session`, which imports vLLM while the node is checked.

        Raises EngineFailed where there is no room for it any more.
        """
        self.log = log
        self._session, self._params = session, params
        self._actor: Actor = session.actor(index)
        self._started = self._actor.begin("start", EngineWorker, params, log)

    def load(self, model: Path, length: EngineLength, **options: Any) -> str:
        """As EngineProcess.load; RequestError for a node that has another model or other software."""
        try:
            facts = self._session.check(self._actor)
            self._actor.answer(self._actor.result(self._started, silence=None))
            self.log = self._ask("log")
            if not self.log.exists():  # of another machine
                self.log = Path(f"{facts.host}:{self.log}")
            backend: str = self._ask("load", model.absolute(), length, **options)
            return backend
        except BaseException:
            self.kill()
            raise

    def score(self, rows: Sequence[Row], advance: Advance, *, sketched: Sequence[bool] | None = None) -> Scored:
        """As EngineProcess.score."""
        told = [0, 0]

        def tell(more_rows: int, more_tokens: int = 0, /) -> None:
            told[0] += more_rows
            told[1] += more_tokens
            advance(more_rows, more_tokens)

        try:
            options = {} if sketched is None else {"sketched": list(sketched)}
            scored = unpack_scored(self._ask("score", *pack_rows(rows), advance=tell, **options))
        except BaseException:
            self.kill()
            raise
        tokens = sum(len(prompt) + len(response) for prompt, response in rows)
        advance(len(rows) - told[0], tokens - told[1])
        return scored

    def _ask(self, method: str, *arguments: Any, advance: Advance | None = None, **options: Any) -> Any:
        begun = self._actor.begin("ask", method, *arguments, **options)
        # The engine's own silence is measured beside it, on the node.
        return self._actor.answer(self._actor.result(begun, silence=self._params.timeout_seconds, advance=advance))

    def close(self) -> None:
        """End the engine in peace, and the actor with it."""
        with suppress(EngineFailed):
            self._actor.outcome("ask", "close", silence=CLOSE_SECONDS)
        self.kill()

    def kill(self) -> None:
        """Its engine dies with the actor. May be called while another thread waits for an answer, which then fails."""
        self._actor.kill()
