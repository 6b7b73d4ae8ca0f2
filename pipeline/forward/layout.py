"""How a micro-batch lies in memory: padded rows, or one run without pads. Results don't depend on it but for rounding.

padded: a row a sequence; the plain way, which the others are tested against. packed: prompt and response of every
distinct response, one after another. shared_prompts: every prompt once, before all its responses.
"""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from pipeline.errors import RequestError
from pipeline.forward.logps import ResponseLogps, TokenBatch, collate, pack
from pipeline.forward.prompt_groups import UnsupportedAttention, attend
from pipeline.model.parts import causal_model, text_config
from pipeline.model.stand_in import made_up, stand_in

ATTENTION = "refcache_prompt_groups"  # its name among transformers' attention implementations
# Frequencies that change with the longest sequence at hand; a run has another one than each of its sequences.
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}
# Both layouts round differently; what sees a wrong token is off by far more.
_TOLERANCE = 1e-3

AttentionInterface.register(ATTENTION, attend)


def choose_layout(model: nn.Module, wanted: str, *, best: str) -> str:
    """Prepare the model for the layout and return it; `auto` is `best` where the model's attention can do it.

    A model that can't is found by trying: a stand-in of the same architecture gets a few made-up sequences in both
    layouts. Raises RequestError where the layout was asked for by name.
    """
    if wanted == "padded":
        return wanted
    inner = causal_model(model)
    problem = _problem(inner)
    if problem is None:
        inner.set_attn_implementation(ATTENTION)
        return best if wanted == "auto" else wanted
    found = f"{type(inner).__name__} can't be trained on sequences in one run: {problem}."
    if wanted != "auto":
        raise RequestError(f"{found} Set layout: padded.")
    print(f"{found} Using layout: padded.", file=sys.stderr, flush=True)
    return "padded"


def _problem(model: PreTrainedModel) -> str | None:
    rope = _rope_types(getattr(text_config(model), "rope_parameters", None))
    if rope & _LENGTH_DEPENDENT_ROPE:
        return f"its rotary frequencies ({', '.join(sorted(rope))}) depend on the longest sequence"
    try:
        return _fault_of(stand_in(model))
    except (
        UnsupportedAttention,
        AttributeError,
        KeyError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as e:
        return str(e) or type(e).__name__


def _rope_types(parameters: Any) -> set[str]:
    if not isinstance(parameters, Mapping):
        return set()
    own = {parameters["rope_type"]} if isinstance(parameters.get("rope_type"), str) else set()
    return own.union(*(_rope_types(part) for part in parameters.values()))  # some have one set for each kind of layer


@torch.no_grad()
def _fault_of(model: PreTrainedModel) -> str | None:
    sequences, prompts = made_up()
    logps = ResponseLogps(model, None)
    padded = _in_order(logps, collate(sequences))
    model.set_attn_implementation(ATTENTION)
    run = pack(sequences, prompts)
    packed = _in_order(logps, run)
    assert run.groups is not None
    layers = text_config(model).num_hidden_layers
    if len(run.groups.served) != layers:
        return f"{len(run.groups.served)} of its {layers} layers use transformers' attention interface"
    difference = float((packed - padded).abs().max() / padded.abs().max())
    if not difference < _TOLERANCE:
        return f"hidden states differ by {difference:.1e} of the largest between both layouts"
    return None


def _in_order(logps: ResponseLogps, batch: TokenBatch) -> Tensor:
    """Hidden states (T, width) in the order of the sequences."""
    return logps.states(batch.input_ids, batch.places, batch.position_ids, batch.groups)[
        batch.rows.argsort(stable=True)
    ]
