"""Proof that a folder holds the model that was meant: both answer alike for a few made-up tokens."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import RunFailed
from pipeline.model.opening import open_model
from pipeline.model.parts import causal_model

# Nats. Merging and saving in float32 were seen to round by 2e-5; a lost tensor or a wrong tie is off by 1e-2 and more.
TOLERANCE = 1e-3
_ROWS, _LENGTH = 3, 24


def made_up_ids(vocabulary: int, count: int) -> np.ndarray:
    """Token ids, int32, (count,), the same for the same arguments.

    Ordinary ones: a model may treat the highest ids as pictures or tools.
    """
    return np.random.default_rng(0).integers(0, min(vocabulary, 1000), count).astype(np.int32)


class Answers(NamedTuple):
    """ids: made-up tokens, (rows, tokens); logps: of every next token, nats, float32, (rows, tokens, vocabulary)."""

    ids: Tensor
    logps: Tensor


def answers(model: torch.nn.Module, *, ids: Tensor | None = None) -> Answers:
    """What a model in evaluation mode says to `ids`, by default some made up for its vocabulary; on the CPU."""
    if ids is None:
        drawn = made_up_ids(vocabulary_of(model), _ROWS * _LENGTH)
        ids = torch.from_numpy(drawn.astype(np.int64)).reshape(_ROWS, _LENGTH)
    with torch.inference_mode():
        logits = model(ids.to(next(model.parameters()).device)).logits
        return Answers(ids, logits.float().log_softmax(-1).cpu())


def require_same_answers(model: torch.nn.Module, expected: Answers, failed: str) -> None:
    """RunFailed unless `model` answers as `expected`, within TOLERANCE. failed: how the message begins."""
    found = answers(model, ids=expected.ids).logps
    difference = float((found - expected.logps).abs().max()) if found.shape == expected.logps.shape else float("inf")
    if not difference <= TOLERANCE:
        raise RunFailed(
            f"{failed}: for made-up tokens its log-probs differ by {difference:.3g} nats (at most {TOLERANCE:g} is "
            "rounding), so it is another model than the one meant. Nothing was published."
        )


def require_written(folder: Path, expected: Answers, *, trust_remote_code: bool = False) -> None:
    """Open a written model again; RunFailed unless it answers as what was to be written."""
    written = open_model(folder, dtype=torch.float32, trust_remote_code=trust_remote_code)
    require_same_answers(written, expected, f"{folder}, opened again")


def vocabulary_of(model: torch.nn.Module) -> int:
    """Rows of the embedding: above every token id that the model takes."""
    weight = causal_model(model).get_input_embeddings().weight
    return int(getattr(weight, "ds_shape", weight.shape)[0])  # ds_shape: under ZeRO-3 a rank has no row itself
