"""Products of bf16 matrices on CPUs that have no instructions for them: in float32, rounded once.

That is what such instructions do too: bf16 numbers are exact in float32, products are added up in float32, and the
result is rounded. Emulated one by one they take 2.5 to 5 times as long as the same product in float32 (AVX-512 without
AVX512-BF16 or AMX), however cheap the conversion.
"""

import functools
import platform
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_BLOCK = 16_384  # rows or columns of the longest matrix that are converted at a time


@functools.cache
def _emulated() -> bool:
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    return not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def wants_float32(tensor: Tensor) -> bool:
    """Whether products of this matrix are faster in float32, conversions included."""
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and _emulated()


def mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a @ b into out. a: (n, m), b: (m, p), out: (n, p), of one dtype."""
    if not wants_float32(a):
        return torch.mm(a, b, out=out)
    if len(b) <= _BLOCK:
        wide = a.float()
        for start in range(0, b.shape[1], _BLOCK):
            columns = slice(start, start + _BLOCK)
            out[:, columns] = wide @ b[:, columns].float()
        return out
    total = torch.zeros(out.shape)
    for start in range(0, len(b), _BLOCK):
        inner = slice(start, start + _BLOCK)
        total.addmm_(a[:, inner].float(), b[inner].float())
    return out.copy_(total)


def add_mm(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, rounded once. a: (n, m), b: (m, p), total: (n, p), of one dtype."""
    if not wants_float32(total):
        total.addmm_(a, b)
        return
    wide = b.float()
    for start in range(0, len(a), _BLOCK):
        rows = slice(start, start + _BLOCK)
        total[rows] = total[rows].float().addmm_(a[rows].float(), wide)


def use_float32_products(model: nn.Module) -> None:
    """Let the linear layers of `model` choose, at every forward, by what their weights are then."""
    if _emulated():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = _Linear


class _Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        if not wants_float32(self.weight) or input.dtype != self.weight.dtype:
            return super().forward(input)
        apply: Callable[..., Tensor] = _Float32Linear.apply
        return apply(input, self.weight, self.bias)


class _Float32Linear(torch.autograd.Function):
    """F.linear; only the bf16 matrices are kept for backward, as without it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wide = grad.float()
        for_x = (wide @ weight.float()).to(x.dtype) if ctx.needs_input_grad[0] else None
        rows = wide.flatten(0, -2)
        for_weight = (rows.T @ x.flatten(0, -2).float()).to(weight.dtype) if ctx.needs_input_grad[1] else None
        for_bias = rows.sum(dim=0).to(weight.dtype) if ctx.needs_input_grad[2] else None
        return for_x, for_weight, for_bias
