"""Attention over a whole run of prompt groups in one call: PyTorch's FlexAttention (Dong et al. 2024), for CUDA.

One call for each group (prompt_groups.py) suits a CPU; a GPU waits for the launches of many small kernels.
FlexAttention knows the mask in blocks of 128 x 128 tokens and skips those that it hides.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import FlexKernelOptions, flex_attention
from transformers import AttentionInterface

from pipeline.forward.prompt_groups import PromptGroups, refuse_what_is_unknown

FLEX = "refcache_whole_run"  # its name among transformers' attention implementations
# Compiled apart: with gradients and without, runs of one block and of more, the first length and all others (a symbol).
_VARIANTS = 64
# Short runs too: what was tried before training is then what trains.
_KERNEL: FlexKernelOptions = {"BACKEND": "TRITON"}


def attend_at_once(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    prompt_groups: PromptGroups,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What `attend` computes, shapes and errors included, without dropout; the mask is made once for all layers.

    On CPU it isn't compiled, holds all scores at once, and PyTorch refuses gradients.
    """
    refuse_what_is_unknown(module, attention_mask, sliding_window, others | {"dropout": dropout or None})
    prompt_groups.served.add(id(module))
    kernel: Any = compiled() if query.is_cuda else flex_attention
    mask = prompt_groups.block_mask(prompt_groups.window(sliding_window))
    found: Tensor = kernel(query, key, value, block_mask=mask, scale=scaling, enable_gqa=True, kernel_options=_KERNEL)
    return found.transpose(1, 2), None


@cache
def compiled() -> Callable[..., Tensor]:
    # fullgraph: what can't be compiled is an error, where PyTorch would go on with all scores in memory.
    options: dict[str, Any] = {"fullgraph": True}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = _VARIANTS
    else:  # torch 2.11 has it for the whole process alone
        limits: Any = torch._dynamo.config
        limits.recompile_limit = max(_VARIANTS, limits.recompile_limit)
    made: Callable[..., Tensor] = torch.compile(flex_attention, **options)
    return made


AttentionInterface.register(FLEX, attend_at_once)
