"""Attention that computes what the config says: kernels leave out what they don't know, without a word.

transformers 5.19 loads Gemma 2 with PyTorch's sdpa, which has no soft cap of attention scores; its eager attention has.
"""

import json
import sys
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.errors import RequestError
from pipeline.model.parts import text_config
from pipeline.model.stand_in import VOCABULARY, made_up, stand_in

# Fields of configs that change what is computed, and that a kernel, or code that came with a model, may pass over.
FIELDS = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "query_pre_attn_scalar",
    "attention_multiplier",
    "residual_multiplier",
    "embedding_multiplier",
    "logits_scaling",
    "logit_scale",
    "sliding_window",
)
# Of the log-probs' largest. Rounding was 1e-6, a cap that is left out 1e-1.
_TOLERANCE = 1e-3
# Norms of the rows that make queries and keys: scores of a few, as they mostly are, and of hundreds, where caps bite.
_USUAL, _LARGE = 3.0, 30.0
_QUERIES_AND_KEYS = ("q_proj", "k_proj", "qkv", "query_key_value", "c_attn")
_JUDGED: dict[str, tuple[str | None, list[str]]] = {}  # by class and config


def use_exact_attention(model: PreTrainedModel) -> None:
    """Let `model` use eager attention where its own implementation leaves out what its config has a number for.

    Raises RequestError for a number of the config that changes nothing in the forward, as the engine may use it.
    """
    config = text_config(model)
    numbers = {name: value for name in FIELDS if (value := getattr(config, name, None)) is not None}
    if not numbers:
        return
    key = json.dumps([type(model).__name__, config.to_dict(), config._attn_implementation], default=str, sort_keys=True)
    if key not in _JUDGED:
        _JUDGED[key] = _judge(model, numbers)
    problem, ignored = _JUDGED[key]
    if ignored:
        raise RequestError(
            f"{type(model).__name__}: its config has {', '.join(f'{name} {numbers[name]}' for name in ignored)}, which "
            "changes nothing in the forward of transformers, so the trainer may compute another function than the "
            "engine. Remove it from config.json if the model was trained without, or use another model."
        )
    if problem:
        print(f"{type(model).__name__}: {problem}; using eager attention", file=sys.stderr, flush=True)
        model.set_attn_implementation("eager")


def _judge(model: PreTrainedModel, numbers: dict[str, Any]) -> tuple[str | None, list[str]]:
    """(why the model's own implementation is not exact, which numbers eager attention passes over as well)."""
    try:
        made = _scored(stand_in(model), _LARGE)
        own, implementation = _logps(made), text_config(made)._attn_implementation
        made.set_attn_implementation("eager")
        exact = _logps(made)
        usual = _usual_logps(model)
        others = {name: _usual_logps(model, **_other(name, value)) for name, value in numbers.items()}
    except (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        name = type(model).__name__
        print(f"No stand-in of {name} to try {', '.join(numbers)} on: {error}", file=sys.stderr, flush=True)
        return None, []
    off = float((own - exact).abs().max() / exact.abs().max())
    problem = None if off <= _TOLERANCE else f"{implementation} attention is off by {off:.1e} from what its config says"
    return problem, [name for name, other in others.items() if torch.equal(usual, other)]


def _other(name: str, value: Any) -> dict[str, Any]:
    return {name: 3 if name == "sliding_window" else max(1, value // 2) if isinstance(value, int) else value / 2}


def _usual_logps(model: PreTrainedModel, **changes: Any) -> Tensor:
    made = _scored(stand_in(model, **changes), _USUAL)
    made.set_attn_implementation("eager")
    return _logps(made)


@torch.no_grad()
def _scored(model: PreTrainedModel, norm: float) -> PreTrainedModel:
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and any(part in name for part in _QUERIES_AND_KEYS):
            parameter.mul_(norm / parameter.norm(dim=1, keepdim=True))
    return model


@torch.no_grad()
def _logps(model: PreTrainedModel) -> Tensor:
    """Of a sequence longer than the stand-in's window."""
    prompt, response = made_up()[0][-1]
    logits: Tensor = model(torch.tensor([prompt + response]), use_cache=False).logits
    return logits[..., :VOCABULARY].float().log_softmax(-1)
