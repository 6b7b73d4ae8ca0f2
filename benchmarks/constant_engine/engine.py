"""Takes vLLM's place in the real engine process and gives every token the same log-prob, at no cost.

It is what a model whose weights are all zero gives: -log(vocabulary). So the probe at start-up and the drift, which
transformers compute from such a model (benchmarks/synthetic_pairs.py), pass as they are.

$REFCACHE_ENGINE_BUSY: file that holds the seconds which this engine spent on answers.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.sketches.head_plan import HeadPlan, HeadSketch


def on_cpu() -> bool:
    return True


class VLLMEngine:
    def __init__(self, model: Path, *, plan: HeadPlan | None = None, **ignored: Any) -> None:
        vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
        self.logps = np.full(1 << 16, -np.log(vocabulary), np.float32)
        self.plan, self.busy = plan, 0.0
        self.record = os.open(os.environ["REFCACHE_ENGINE_BUSY"], os.O_WRONLY | os.O_CREAT)

    def score(
        self,
        rows: Sequence[tuple[np.ndarray, np.ndarray]],
        on_finished: Callable[[int, int], None],
        sketched: Sequence[bool] = (),
    ) -> tuple[Any, ...]:
        started = time.perf_counter()
        found = [self.logps[: len(response)] for _, response in rows]
        sketches = [self._sketch() if wanted else None for wanted in sketched]
        on_finished(len(rows), sum(len(prompt) + len(response) for prompt, response in rows))
        self.busy += time.perf_counter() - started
        os.pwrite(self.record, f"{self.busy:.6f}\n".encode(), 0)
        return found, 0, 0, sketches

    def _sketch(self) -> HeadSketch:
        assert self.plan is not None
        return HeadSketch(np.ones(self.plan.k, np.float32), np.ones(self.plan.audit, np.float32), 1.0)
