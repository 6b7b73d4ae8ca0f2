"""Attention in one call equals attention group by group, and faster kernels are used only where they are proven."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import create_mask
from transformers import AttentionInterface

from pipeline.errors import RequestError
from pipeline.forward import flex_attention
from pipeline.forward.flex_attention import FLEX, attend_at_once
from pipeline.forward.kernels import choose_kernels, fault_of, use_flex
from pipeline.forward.layout import ATTENTION
from pipeline.forward.logps import collate, pack
from pipeline.forward.prompt_groups import PromptGroups, UnsupportedAttention, attend
from pipeline.params import SftParams
from tests.pipeline.forward.test_layout import ARCHITECTURES, losses_and_gradient, tiny_model

GROUPS = st.lists(st.lists(st.integers(1, 15), min_size=2, max_size=4), min_size=1, max_size=4)
RUNS = ([(5, 4), (60, 70, 3), (40, 9)], [(3, 2, 4), (140, 20, 80, 7), (150, 30)])  # more than one block of 128 tokens


@pytest.fixture(scope="module")
def compiled():
    """FlexAttention as torch.compile traces and guards it on CUDA, but run as it is; counts what is compiled.

    In this form PyTorch has its gradients on CPU too, and refuses them only because its CPU kernels have none.
    """
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend=counter))
        kernel = flex_attention.compiled.__wrapped__()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
        patch.setattr(flex_attention, "flex_attention", kernel)
        yield counter


@pytest.fixture(scope="module")
def qwen2():
    model = tiny_model("qwen2")
    model.set_attn_implementation(ATTENTION)
    return model


def sequences(groups):
    """(prompt ids, response ids) of every response, and the number of its prompt."""
    draw = torch.Generator().manual_seed(sum(map(sum, groups)))
    found, numbers = [], []
    for number, (prompt, *responses) in enumerate(groups):
        first = torch.randint(3, 61, (prompt,), generator=draw).tolist()
        for response in responses:
            found.append((first, torch.randint(3, 61, (response,), generator=draw).tolist()))
            numbers.append(number)
    return found, numbers


@pytest.mark.slow  # traced and guarded by torch.compile
@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gemma3_text"])
def test_one_call_gives_the_log_probs_and_gradient_of_groups_and_of_padded_rows(compiled, architecture):
    model = tiny_model(architecture, **ARCHITECTURES[architecture])
    for groups in RUNS:
        rows, prompts = sequences(groups)
        expected = losses_and_gradient(model, collate(rows), "sdpa", len(rows))
        scale = float(expected[1].abs().max())
        for numbers in (prompts, range(len(rows))):
            run = pack(rows, numbers)
            for attention in (FLEX, ATTENTION):
                sums, gradient = losses_and_gradient(model, run, attention, len(rows))
                torch.testing.assert_close(sums, expected[0], atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(gradient, expected[1], atol=1e-5 * scale, rtol=1e-5)


@pytest.mark.slow  # traced and guarded by torch.compile
def test_other_lengths_and_groups_are_not_compiled_anew(compiled, qwen2):
    for n in range(5):
        rows, prompts = sequences([(50 + n, 60 + 9 * n, 70 + n), *[(10, 5)] * n])
        losses_and_gradient(qwen2, pack(rows, prompts), FLEX, len(rows))
        if n == 1:
            first_two = compiled.frame_count
    assert compiled.frame_count == first_two


@given(GROUPS, st.none() | st.integers(1, 20))
@settings(max_examples=20, deadline=None)
def test_the_block_mask_shows_a_token_its_prompt_and_the_response_up_to_itself(groups, window):
    expected = np.zeros(2 * [sum(map(sum, groups))], bool)
    start = 0
    for prompt, *responses in groups:
        shared, start = list(range(start, start + prompt)), start + prompt
        parts = [(shared, 0)]
        for response in responses:
            parts.append((shared + list(range(start, start + response)), prompt))
            start += response
        for sequence, begin in parts:
            for place in range(begin, len(sequence)):
                expected[sequence[place], sequence[: place + 1][-(window or start) :]] = True
    mask = PromptGroups(groups).block_mask(window)
    np.testing.assert_array_equal(create_mask(mask.mask_mod, 1, 1, start, start)[0, 0], expected)


def test_attention_in_one_call_refuses_what_groups_refuse_and_dropout():
    layer, part, groups = torch.nn.Module(), torch.zeros(1, 4, 5, 8), PromptGroups([(2, 3)])
    for asked in ({"softcap": 30.0}, {"s_aux": part}, {"dropout": 0.1}):
        with pytest.raises(UnsupportedAttention, match=next(iter(asked))):
            attend_at_once(layer, part, part, part, None, prompt_groups=groups, **asked)
    with pytest.raises(UnsupportedAttention, match="attention_mask"):
        attend_at_once(layer, part, part, part, part, prompt_groups=groups)


def sees_other_responses(*args, prompt_groups, **options):
    merged = PromptGroups([(prompt, sum(responses)) for prompt, *responses in prompt_groups.lengths])
    return attend(*args, prompt_groups=merged, **options)


def doubles_the_gradient(*args, **options):
    found, _ = attend(*args, **options)
    return 2 * found - found.detach(), None


def does_not_compile(*_, **__):
    raise RuntimeError("BackendCompilerFailed:\n  no kernel")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
class TestKernelsOnTrial:
    @pytest.mark.slow
    def test_attention_in_one_call_passes(self, compiled, qwen2, dtype):
        assert fault_of(qwen2, use_flex, "packed", dtype) is None

    @pytest.mark.parametrize(
        ("attention", "reason"),
        [
            (sees_other_responses, "hidden states of a stand-in are off by"),
            (doubles_the_gradient, "gradients of a stand-in are off by"),
            (does_not_compile, "RuntimeError: BackendCompilerFailed: no kernel"),
        ],
    )
    def test_wrong_states_wrong_gradients_and_compilers_that_fail_do_not(self, qwen2, dtype, attention, reason):
        AttentionInterface.register("refcache_on_trial", attention)
        found = fault_of(qwen2, lambda made: made.set_attn_implementation("refcache_on_trial"), "packed", dtype)
        assert found is not None and found.startswith(reason)


def chosen(model, layout="shared_prompts", **loop):
    return choose_kernels(model, layout, SftParams(**loop))


@pytest.mark.skipif(torch.cuda.is_available(), reason="how it is without CUDA; tests/gpu has the rest")
class TestWithoutCuda:
    def test_auto_is_groups_and_plain_layers_without_a_word(self, qwen2, capfd):
        assert chosen(qwen2) == {"attention": "sdpa", "layer_kernels": "torch"}
        assert qwen2.config._attn_implementation == ATTENTION
        assert capfd.readouterr().err == ""

    def test_kernels_asked_for_by_name_are_refused_with_the_reason(self, qwen2):
        with pytest.raises(RequestError, match=r"attention: flex .* no CUDA device"):
            chosen(qwen2, attention="flex")
        with pytest.raises(RequestError, match=r"attention: flex .* layout is padded"):
            chosen(qwen2, layout="padded", attention="flex")
        with pytest.raises(RequestError, match=r"layer_kernels: liger .*`pip install liger-kernel`"):
            chosen(qwen2, layer_kernels="liger")

    def test_auto_falls_back_on_a_device_that_fails_and_says_why(self, qwen2, monkeypatch, capfd):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert chosen(qwen2) == {"attention": "sdpa", "layer_kernels": "torch"}
        assert qwen2.config._attn_implementation == ATTENTION
        said = capfd.readouterr().err
        assert "Not using attention: flex: " in said and "CUDA" in said
        assert "Not using layer_kernels: liger: it is not installed" in said

    def test_a_model_with_dropout_keeps_groups(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        model = tiny_model("gpt2", n_layer=2, n_head=4, n_embd=32, attn_pdrop=0.1, resid_pdrop=0.0, embd_pdrop=0.0)
        with pytest.raises(RequestError, match=r"attention: flex .* dropout"):
            chosen(model, attention="flex")
