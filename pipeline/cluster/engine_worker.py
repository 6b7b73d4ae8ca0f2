"""The worker of scoring: an engine's process on a node, asked in packed rows."""

import tempfile
from pathlib import Path
from typing import Any

from pipeline.cluster.packed import Packed, PackedScored, pack_scored, unpack_rows
from pipeline.engine.process import EngineProcess
from pipeline.params import ScoreParams
from pipeline.progress import Advance


class EngineWorker:
    def __init__(self, params: ScoreParams, log: Path) -> None:
        """log: the stage's choice, taken where its folder is there on this node as well."""
        self._engine = EngineProcess(params, log=log if log.parent.is_dir() else _own_folder() / log.name)

    def load(self, *arguments: Any, on_progress: Advance, **options: Any) -> str:
        return self._engine.load(*arguments, **options)

    def log(self, *, on_progress: Advance) -> Path:
        return self._engine.log

    def pid(self, *, on_progress: Advance) -> int:
        return self._engine.pid

    def score(self, prompts: Packed, responses: Packed, *, on_progress: Advance, **options: Any) -> PackedScored:
        return pack_scored(self._engine.score(unpack_rows(prompts, responses), on_progress, **options))

    def close(self, *, on_progress: Advance) -> None:
        self._engine.close()


def _own_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="refcache-log-"))
