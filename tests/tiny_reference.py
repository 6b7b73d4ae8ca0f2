"""Adversarial rows for the tiny model, and what transformers says of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from pipeline.engine import process
from tests.engine_nursery import engines
from tests.tiny import EOS, POSITIONS, VOCABULARY


def transformers_token_logps(model: Path, rows: list[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """log p(token | all before it) of every token but the very first, float32, straight from all logits."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found = []
    for prompt, response in rows:
        ids = torch.tensor([[*prompt, *response]])
        with torch.no_grad():
            logps = loaded(ids).logits[0].log_softmax(-1)
        found.append(logps[:-1].gather(1, ids[0, 1:, None])[:, 0].numpy())
    return found


def adversarial_rows(seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """(prompt ids, response ids): lengths of one, of blocks, of the limit; shared, nested and repeated responses."""
    random = np.random.default_rng(seed)

    def draw(n: int) -> np.ndarray:
        return random.integers(3, VOCABULARY, n).astype(np.int32)

    rows = [(draw(p), draw(r)) for p in (1, 2, 127, 128, 129, 256) for r in (1, 2, 40)]
    rows.append((draw(1), draw(POSITIONS - 1)))
    rows.append((draw(POSITIONS - 1), draw(1)))
    rows.append((draw(128), draw(POSITIONS - 128)))
    shared, opening, tail = draw(128), draw(30), draw(10)
    rows += [(shared, opening[:n]) for n in (1, 2, 29, 30)]  # each a prefix of the next
    rows += [(shared, np.append(opening, last).astype(np.int32)) for last in (5, 6, EOS)]  # alike but for the last
    rows += [(prompt, tail) for prompt in (draw(1), draw(64), shared, shared[:127])]  # one response, many prompts
    rows += [(shared, tail[:0:-1].copy()), (shared, np.full(12, 7, np.int32))]
    return rows


@contextmanager
def quick_engine() -> Iterator[pytest.MonkeyPatch]:
    """A tiny engine starts fastest and leaves the machine to others: one thread, and vLLM imported once for all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(process, "start_server", lambda *what: engines().start_server(*what))
        yield patch
