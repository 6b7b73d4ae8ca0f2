"""Pairs that don't train, measured now and then while others do; their reference values come from the cache too."""

import numpy as np
import torch

from pipeline.params import LoopParams
from pipeline.training.deepspeed_engine import Engine
from pipeline.training.loop import Task


class HeldOutPairs:
    def __init__(self, task: Task, loop: LoopParams, *, every: int) -> None:
        """task: over the held-out pairs alone. every: optimizer steps between measurements."""
        self.task, self.every = task, every
        self.micro_batch_size, self.tokens_per_batch = loop.micro_batch_size, loop.tokens_per_batch

    def due(self, step: int, steps: int) -> bool:
        """After every so many steps, and after the last one."""
        return step % self.every == 0 or step == steps

    def measure(self, engine: Engine) -> dict[str, float]:
        """The history's columns as means over the held-out pairs. Collective; the policy stays as it is."""
        everything = np.arange(len(self.task.lengths))
        totals: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            for micro, counts in self.micro_batches(engine):
                _, sums = self.task.loss(engine, micro, everything)
                for name, value in sums.items():
                    totals[name] = totals.get(name, 0) + value.double() * counts
        values = engine.sum_over_ranks(torch.stack(list(totals.values()))).tolist()
        return self.task.summarise(dict(zip(totals, values, strict=True)), everything)

    def micro_batches(self, engine: Engine) -> list[tuple[np.ndarray, bool]]:
        """This rank's micro-batches, as many on every rank, each with whether it counts.

        Under ZeRO-3 a forward is a collective, so a rank with less to do forwards a pair that doesn't count.
        """
        of_ranks = [self._share(rank, engine.ranks) for rank in range(engine.ranks)]
        mine = of_ranks[engine.rank]
        missing = max(map(len, of_ranks)) - len(mine)
        return [(micro, True) for micro in mine] + [(np.zeros(1, np.int64), False)] * missing

    def _share(self, rank: int, ranks: int) -> list[np.ndarray]:
        parts: list[np.ndarray] = []
        for example in np.argsort(self.task.lengths, kind="stable")[rank::ranks]:
            grown = np.append(parts[-1], example) if parts else np.array([example])
            if parts and self._fits(grown):
                parts[-1] = grown
            else:
                parts.append(np.array([example]))
        return parts

    def _fits(self, examples: np.ndarray) -> bool:
        if self.tokens_per_batch is None:
            return len(examples) <= self.micro_batch_size
        return self.task.tokens(examples) <= self.tokens_per_batch
