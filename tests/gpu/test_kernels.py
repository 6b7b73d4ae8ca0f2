"""Compiled kernels on a CUDA device against the plain ones: `pytest -m gpu`."""

import sys

import pytest
import torch
from transformers import AttentionInterface

from pipeline.forward.kernels import TIMES, TOLERANCE, choose_kernels, fault_of, use_flex, use_liger
from pipeline.forward.layout import ATTENTION
from pipeline.forward.logps import ResponseLogps, pack
from pipeline.params import SftParams
from tests.pipeline.forward.test_kernels import doubles_the_gradient, sequences
from tests.pipeline.forward.test_layout import losses_and_gradient, tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

WIDE = {"hidden_size": 128, "intermediate_size": 256}  # heads of 32: kernels need 16 at least
ARCHITECTURES = {
    "qwen2": WIDE | {"num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 32},  # 7 heads share a key
    "llama": WIDE,
    "mistral": WIDE | {"sliding_window": 50},
    "gemma3_text": WIDE
    | {"head_dim": 32, "sliding_window": 50, "layer_types": ["sliding_attention", "full_attention"]},
}
# Lengths and numbers of groups differ; one run fits into a block of 128 tokens.
RUNS = ([(140, 20, 80, 7), (150, 30)], [(5, 4), (60, 30, 3)], [(400, 300, 200), (20, 9), (256, 128)])


def plain(architecture: str) -> torch.nn.Module:
    model = tiny_model(architecture, **ARCHITECTURES[architecture]).cuda()
    model.set_attn_implementation(ATTENTION)
    return model


def measured(model, dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For every run: sums of log-probs and the gradient by all weights; the model stays in `dtype`."""
    model.to(dtype)
    found = []
    for groups in RUNS:
        rows, prompts = sequences(groups)
        batch = pack(rows, prompts).to("cuda")
        found.append(losses_and_gradient(model, batch, model.config._attn_implementation, len(rows)))
    return found


def assert_as_close_as(found, before, exact):
    for ours, theirs, right in zip(found, before, exact, strict=True):
        for part, plain_part, right_part in zip(ours, theirs, right, strict=True):
            norm = right_part.double().norm()
            off, plain_off = ((x.double() - right_part.double()).norm() / norm for x in (part, plain_part))
            assert off <= max(TOLERANCE, TIMES * plain_off)


def assert_agrees(model, change, dtype, checkpointing):
    model.to(dtype)  # rounds the weights once, for all three
    exact, before = measured(model, torch.float32), measured(model, dtype)
    change(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    assert_as_close_as(measured(model, dtype), before, exact)


@pytest.fixture
def unpatched():
    """Liger replaces classes and functions in transformers' modules, for all that comes later."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("transformers.models.")]
    before = [(module, dict(vars(module))) for module in modules]
    yield
    for module, content in before:
        vars(module).update(content)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_in_one_compiled_call_agrees_with_groups(architecture, dtype, checkpointing):
    assert_agrees(plain(architecture), use_flex, dtype, checkpointing)


@pytest.mark.parametrize("groups", RUNS)
def test_without_gradients_the_same_comes_out(groups):
    model = plain("llama")
    rows, prompts = sequences(groups)
    batch = pack(rows, prompts).to("cuda")
    logps = ResponseLogps(model, None)
    with torch.no_grad():
        expected = logps(*batch)
        use_flex(model)
        torch.testing.assert_close(logps(*batch), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_auto_takes_it_here(architecture, dtype, capfd):
    model = plain(architecture)
    found = choose_kernels(model, "shared_prompts", SftParams(dtype=dtype, layer_kernels="torch"))
    assert found == {"attention": "flex", "layer_kernels": "torch"}, capfd.readouterr().err


def test_a_kernel_with_wrong_gradients_is_found_on_the_device():
    AttentionInterface.register("refcache_on_trial", doubles_the_gradient)
    found = fault_of(
        plain("qwen2"), lambda made: made.set_attn_implementation("refcache_on_trial"), "packed", "bfloat16"
    )
    assert found is not None and found.startswith("gradients")


@pytest.mark.usefixtures("unpatched")
class TestLiger:
    @pytest.fixture(autouse=True)
    def installed(self):
        pytest.importorskip("liger_kernel")

    @pytest.mark.parametrize("checkpointing", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_its_layers_agree_with_transformers_own(self, architecture, dtype, checkpointing):
        assert_agrees(plain(architecture), use_liger, dtype, checkpointing)

    def test_auto_takes_them_beside_attention_in_one_call(self, capfd):
        found = choose_kernels(plain("qwen2"), "shared_prompts", SftParams(dtype="bfloat16"))
        assert found == {"attention": "flex", "layer_kernels": "liger"}, capfd.readouterr().err

    def test_an_architecture_without_kernels_keeps_its_own(self, capfd):
        model = tiny_model("gpt2", n_layer=2, n_head=4, n_embd=64).cuda()
        found = choose_kernels(model, "padded", SftParams())
        assert found["layer_kernels"] == "torch" and "no kernels for GPT2" in capfd.readouterr().err
