"""Sketches of the output head's gradient as they cross the pipe between stage and engine; plain numpy, no torch."""

from typing import NamedTuple

import numpy as np

# Names of the one group, and with it of the column. A tied weight has another part of its gradient as embeddings.
HEAD, HEAD_PART = "head", "head_part"
HEAD_PART_ONLY = (
    "The output head shares its weight with the embeddings. The engine sketches the head's part of the gradient only, "
    "which no `trainable` has by itself; AuxDPO refuses it. It is good for data analysis."
)


class HeadPlan(NamedTuple):
    """Which sketches the engine takes. names: {attribute of the head: the parameter's canonical name}.

    k, audit: numbers of the sketch and of the audit sketch; seed: of the hashes.
    """

    names: dict[str, str]
    k: int
    audit: int
    seed: int


class HeadSketch(NamedTuple):
    """A response's sketch, float32. values: (k,); audit: (audit numbers,); grad_norm: of the head's exact gradient."""

    values: np.ndarray
    audit: np.ndarray
    grad_norm: float
