"""Sketches of the output head's gradient as they cross the pipe between stage and engine; plain numpy, no torch."""

from typing import NamedTuple

import numpy as np


class HeadPlan(NamedTuple):
    """Which sketches the engine takes. names: {attribute of the head: the parameter's canonical name}.

    k, audit: numbers of the sketch and of the audit sketch; seed: of the hashes.
    """

    names: dict[str, str]
    k: int
    audit: int
    seed: int


class HeadSketch(NamedTuple):
    """Of one response, float32. values: (k,); audit: (audit numbers,); grad_norm: of the head's gradient, exact."""

    values: np.ndarray
    audit: np.ndarray
    grad_norm: float
