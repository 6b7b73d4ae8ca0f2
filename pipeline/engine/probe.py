"""A few made-up rows whose log-probs are known before an engine scores real ones.

An engine may have several ways to a log-prob, and not every way is right for every model, version and platform. The
rows share a prompt longer than a block, begin alike, are prefixes of each other; their values come from transformers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.engine.rows import Row
from pipeline.model.opening import open_model

PROMPT_TOKENS, RESPONSE_TOKENS = 133, 41
# Nats per token that a right engine may be off by. A wrong position, head or scale is off by nats on random tokens.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5, "float16": 0.5}


class Probe(NamedTuple):
    """rows and their log-probs, one float32 array (response length,) a row; tolerance: largest difference, nats."""

    rows: list[Row]
    logps: list[np.ndarray]
    tolerance: float

    def largest_difference(self, found: Sequence[np.ndarray]) -> float:
        """Largest difference of a token's log-prob, nats; infinite where the shape or a value is no answer."""
        pairs = list(zip(found, self.logps, strict=True))
        if any(a.shape != b.shape or not np.isfinite(a).all() for a, b in pairs):
            return float("inf")
        return max(float(np.abs(a - b).max()) for a, b in pairs)


def probe_rows(vocabulary: int, longest: int) -> list[Row]:
    """Rows of at most `longest` tokens, at least 2, with ids below `vocabulary`; the same for the same arguments."""
    from pipeline.model.proof import made_up_ids  # torch, which a stage that starts no engine does without

    response_tokens = max(1, min(RESPONSE_TOKENS, longest // 2))
    ids = made_up_ids(vocabulary, PROMPT_TOKENS + 2 * RESPONSE_TOKENS)
    prompt = ids[: max(1, min(PROMPT_TOKENS, longest - response_tokens))]
    response = ids[PROMPT_TOKENS : PROMPT_TOKENS + response_tokens]
    other = ids[PROMPT_TOKENS + RESPONSE_TOKENS :][:response_tokens]
    changed = np.append(response[:-1], (response[-1] + 1) % min(vocabulary, 1000)).astype(np.int32)
    return [(prompt, response), (prompt, changed), (prompt, response[:1]), (prompt, other), (prompt[:1], response)]


def make_probe(
    model: Path, *, vocabulary: int, longest: int, dtype: str, quantization: str | None, trust_remote_code: bool
) -> Probe:
    """Forward the probe's rows once by plain transformers, in `dtype`, on the CPU (the accelerator is the engine's)."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    loaded = open_model(model, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code)
    return probe_of(loaded, vocabulary=vocabulary, longest=longest, dtype=dtype, quantization=quantization)


def probe_of(loaded: Any, *, vocabulary: int, longest: int, dtype: str, quantization: str | None) -> Probe:
    """As `make_probe`, of a model that is open already."""
    import torch

    rows = probe_rows(vocabulary, longest)
    found = []
    with torch.inference_mode():
        for prompt, response in rows:
            ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
            logps = loaded(ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
            found.append(logps.gather(1, ids[len(prompt) :, None])[:, 0].numpy())
    # transformers computes the unquantised weights; quantisation moves single tokens by a nat and more.
    return Probe(rows, found, TOLERANCE[dtype] if quantization is None else 4.0)
