"""Which kernels train: on CUDA, attention in one call (flex_attention.py) and Liger's layers, once proven.

They are tried before training, on this rank's device and in its dtype: a stand-in of the architecture answers for
made-up sequences with them and without, and hidden states and gradients must agree.
"""

import os
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_liger_kernel_available

from pipeline.errors import RequestError
from pipeline.forward.flex_attention import FLEX
from pipeline.forward.logps import ResponseLogps, TokenBatch, collate, pack
from pipeline.model.parts import causal_model, has_dropout, text_config
from pipeline.model.stand_in import made_up, stand_in
from pipeline.params import LoopParams

# How far from float32 kernels may be, as a share of the norm: so far, or so many times as far as what they replace.
TOLERANCE, TIMES = 1e-3, 2.0
# Of made_up: runs of several 128-token blocks, and two lengths, since the second one compiles with lengths as symbols.
_SCALES = (12, 20)
_ANSWERS = ("hidden states", "gradients")
_MESSAGE = 400  # characters of a compiler's error


def choose_kernels(model: nn.Module, layout: str, loop: LoopParams) -> dict[str, str]:
    """Give the model the kernels that loop.attention and loop.layer_kernels name; returns both, `auto` resolved.

    layout: what choose_layout returned. `auto` is the fast kernels where they are proven, with a line on CUDA where
    they are not. Raises RequestError where they were asked for by name and can't be used.
    """
    inner = causal_model(model)
    chosen = {"attention": "sdpa", "layer_kernels": "torch"}
    if _wanted("attention", loop.attention, "flex", lambda: _flex_problem(inner, layout, loop.dtype)):
        use_flex(inner)
        chosen["attention"] = "flex"
    if _wanted("layer_kernels", loop.layer_kernels, "liger", lambda: _liger_problem(inner, layout, loop.dtype)):
        use_liger(inner)
        chosen["layer_kernels"] = "liger"
    return chosen


def use_flex(model: PreTrainedModel) -> None:
    model.set_attn_implementation(FLEX)


def use_liger(model: PreTrainedModel) -> None:
    """Liger's norms, MLPs and rotary positions; NotImplementedError for an architecture without any.

    Not its fused cross-entropy: objectives need a log-prob of every token where that gives one loss, and
    pipeline/forward/head.py doesn't hold all logits either.
    """
    from transformers.integrations.liger import apply_liger_kernel

    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})
    if not any(str(part.forward.__module__).startswith("liger_kernel") for part in model.modules()):
        raise NotImplementedError(f"it has no kernels for {type(model).__name__}")


def _wanted(setting: str, choice: str, name: str, problem: Callable[[], str | None]) -> bool:
    if choice not in ("auto", name):
        return False
    found = problem()
    if found is not None and choice == name:
        raise RequestError(f"{setting}: {name} can't be used here: {found}. Set {setting}: auto to train without it.")
    if found is not None and torch.cuda.is_available():
        print(f"Not using {setting}: {name}: {found}.", file=sys.stderr, flush=True)
    return found is None


def _flex_problem(model: PreTrainedModel, layout: str, dtype: str) -> str | None:
    if layout == "padded":
        return "the layout is padded"
    if not torch.cuda.is_available():
        return "FlexAttention has gradients on CUDA alone, and there is no CUDA device"
    if has_dropout(model):
        return "the model has dropout, and FlexAttention has none"
    return fault_of(model, use_flex, layout, dtype)


def _liger_problem(model: PreTrainedModel, layout: str, dtype: str) -> str | None:
    if not is_liger_kernel_available():
        return "it is not installed; run `pip install liger-kernel`"
    if not torch.cuda.is_available():
        return "its kernels need a CUDA device, and there is none"
    # Liger puts its classes and functions into the architecture's own Python module, also if it fails half-way.
    architecture = vars(sys.modules[type(model).__module__])
    before = dict(architecture)
    found = fault_of(model, use_liger, layout, dtype)
    if found is not None:
        architecture.update(before)
    return found


def fault_of(model: PreTrainedModel, change: Callable[[PreTrainedModel], None], layout: str, dtype: str) -> str | None:
    """What is wrong with a stand-in of `model` after `change`, None if it answers as before but for rounding."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    try:
        batches = [batch.to(device) for batch in _batches(model, layout)]
        made = stand_in(model).to(device, getattr(torch, dtype))
        exact = [part for batch in batches for part in answers(made.float(), batch)]
        before = [part for batch in batches for part in answers(made.to(getattr(torch, dtype)), batch)]
        change(made)
        after = [part for batch in batches for part in answers(made, batch)]
    except Exception as error:  # compilers raise errors of every kind
        return f"{type(error).__name__}: {' '.join(str(error).split())[:_MESSAGE]}"
    for what, found, plain, right in zip(_ANSWERS * len(batches), after, before, exact, strict=True):
        off, plain_off = (float((part - right).norm() / right.norm()) for part in (found, plain))
        if not off <= max(TOLERANCE, TIMES * plain_off):
            return f"{what} of a stand-in are off by {off:.1e} of the norm in {dtype}, without it by {plain_off:.1e}"
    return None


def _batches(model: PreTrainedModel, layout: str) -> list[TokenBatch]:
    most = getattr(text_config(model), "max_position_embeddings", None) or sys.maxsize
    cases = [made_up(min(scale, max(1, most // 16))) for scale in _SCALES]
    return [collate(sequences) if layout == "padded" else pack(sequences, prompts) for sequences, prompts in cases]


def answers(model: PreTrainedModel, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Final hidden states (T, width), and the gradient of a sum of them, weighed at random, by the embeddings."""
    states = ResponseLogps(model, None).states(batch.input_ids, batch.places, batch.position_ids, batch.groups).float()
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(states.device)
    (gradient,) = torch.autograd.grad((states * weights).sum(), model.get_input_embeddings().weight)
    return states.detach(), gradient.float()
