"""Products of bf16 matrices in float32 are the exact ones, rounded once, forwards and backwards."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pipeline.forward import float32_products
from pipeline.forward.float32_products import add_mm, mm, use_float32_products

SIZES = st.integers(1, 9)


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    """As on a CPU without bf16 instructions; blocks of 4, so that small matrices need several."""
    monkeypatch.setattr(float32_products, "_emulated", lambda: True)
    monkeypatch.setattr(float32_products, "_BLOCK", 4)


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def require_rounded_once(found, exact):
    """exact: float64. Half a unit in the last of bf16's 8 places, and what float32 sums may be off."""
    assert found.dtype == torch.bfloat16
    off = (found.double() - exact).abs()
    assert (off <= exact.abs() * 2**-8 + 1e-5).all(), float(off.max())


@given(SIZES, SIZES, SIZES)
def test_a_product_is_rounded_once_in_whatever_blocks(n, m, p):
    a, b = draw(1, n, m), draw(2, m, p)
    out = torch.empty(n, p, dtype=torch.bfloat16)
    assert mm(a, b, out=out) is out
    require_rounded_once(out, a.double() @ b.double())


@given(SIZES, SIZES, SIZES)
def test_a_product_is_added_before_rounding(n, m, p):
    total, a, b = draw(0, n, p), draw(1, n, m), draw(2, m, p)
    exact = total.double() + a.double() @ b.double()
    add_mm(total, a, b)
    require_rounded_once(total, exact)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5)])
def test_a_linear_layer_has_the_exact_values_and_gradients_rounded_once(bias, shape):
    model = nn.Sequential(nn.Linear(5, 6, bias=bias)).bfloat16()
    names = [name for name, _ in model.named_parameters()]
    use_float32_products(model)
    assert [name for name, _ in model.named_parameters()] == names and isinstance(model[0], nn.Linear)
    x, grad = draw(1, *shape).requires_grad_(), draw(2, *shape[:-1], 6)
    out = model(x)
    out.backward(grad)
    exact = [part.detach().double().requires_grad_() for part in (x, *model.parameters())]
    wanted = F.linear(*exact)
    require_rounded_once(out, wanted)
    gradients = torch.autograd.grad(wanted, exact, grad.double())
    for part, gradient in zip((x, *model.parameters()), gradients, strict=True):
        require_rounded_once(part.grad, gradient)


def test_what_is_frozen_gets_no_gradient():
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 2)).bfloat16()
    model[0].requires_grad_(False)
    use_float32_products(model)
    model(draw(1, 3, 5)).sum().backward()
    assert model[0].weight.grad is None and model[0].bias.grad is None and model[1].weight.grad is not None


def test_float32_models_are_computed_as_before():
    model = nn.Sequential(nn.Linear(5, 6))
    x = torch.randn(4, 5)
    before = model(x)
    use_float32_products(model)
    assert torch.equal(model(x), before) and model(x).grad_fn.name() == before.grad_fn.name()


def test_a_cpu_with_bf16_instructions_uses_them(monkeypatch):
    monkeypatch.setattr(float32_products, "_emulated", lambda: False)
    model = nn.Linear(5, 6).bfloat16()
    use_float32_products(model)
    assert type(model) is nn.Linear
    a, b = draw(1, 3, 4), draw(2, 4, 5)
    assert torch.equal(mm(a, b, out=a.new_empty(3, 5)), a @ b)
