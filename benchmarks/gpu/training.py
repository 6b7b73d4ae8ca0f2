"""What both contenders are told to train, and how their work is counted."""

from typing import Any, Protocol

import numpy as np

from pipeline.training.batches import batch_indices

BETA, LEARNING_RATE = 0.1, 1e-6
ORDERS = {"ultrafeedback": "examples", "gsm8k": "prompts"}  # of batches


class Examples(Protocol):
    lengths: np.ndarray  # tokens of prompt + chosen and prompt + rejected, (pairs,)
    groups: np.ndarray  # a number for each one's prompt, (pairs,)


def pair_tokens(examples: Examples, data: str, batch_size: int, steps: range) -> int:
    """Prompt + chosen and prompt + rejected of every pair of these steps, whatever is computed of them."""
    groups = examples.groups if ORDERS[data] == "prompts" else None
    size: dict[str, Any] = {"n_examples": len(examples.lengths), "batch_size": batch_size}
    return sum(int(examples.lengths[batch_indices(step, seed=0, groups=groups, **size)].sum()) for step in steps)
