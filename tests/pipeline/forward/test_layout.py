"""Padded rows, packed sequences and shared prompts are one computation: the same log-probs and the same gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.errors import RequestError
from pipeline.forward import prompt_groups
from pipeline.forward.layout import ATTENTION, choose_layout
from pipeline.forward.logps import ResponseLogps, collate, pack, sequence_sums
from pipeline.forward.prompt_groups import PromptGroups, UnsupportedAttention, attend
from tests.pipeline.forward.test_logps import TINY

ARCHITECTURES = {
    "qwen2": {},
    "llama": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "qwen3": {"head_dim": 8, "num_key_value_heads": 1},
    "mistral": {"sliding_window": 5},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {"n_layer": 2, "n_head": 4, "n_embd": 32},  # learnt positions
}
REFUSED = {
    "gemma2": ({"head_dim": 8}, "softcap"),
    "bloom": ({"n_layer": 2, "n_head": 4}, "0 of its 2 layers"),  # ALiBi
    "mamba": ({}, "."),
    "gpt_oss": ({"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "rope_parameters": None}, "s_aux"),
}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}


def tiny_model(architecture: str, *, dtype=torch.float32, **config) -> torch.nn.Module:
    torch.manual_seed(0)
    whole = AutoConfig.for_model(architecture, **TINY | config)
    model = AutoModelForCausalLM.from_config(whole, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # else every token is about equally likely, whatever it sees
    return model


@pytest.fixture(scope="module")
def models():
    """In float64: in float32 rounding alone moves a gradient by 1e-5 of its largest value in one case of hundreds."""
    return {name: tiny_model(name, dtype=torch.float64, **config) for name, config in ARCHITECTURES.items()}


@st.composite
def grouped_sequences(draw):
    """Prompts with one to four responses each, and for every sequence the number of its prompt, shuffled."""
    random = draw(st.randoms(use_true_random=False))
    rows = []
    for number, responses in enumerate(draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))):
        prompt = [random.randrange(3, 61) for _ in range(draw(st.integers(1, 12)))]
        for _ in range(responses):
            rows.append((prompt, [random.randrange(3, 61) for _ in range(draw(st.integers(1, 14)))], number))
    random.shuffle(rows)
    return [row[:2] for row in rows], [row[2] for row in rows]


def losses_and_gradient(model, batch, attention: str, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of every sequence, and the gradient of a loss that weighs each differently."""
    before = model.config._attn_implementation
    model.set_attn_implementation(attention)
    model.zero_grad()
    sums = sequence_sums(ResponseLogps(model, 7)(*batch), batch.rows, n)
    torch.nn.functional.softplus(sums.mul(torch.linspace(-0.1, 0.1, n))).sum().backward()
    model.set_attn_implementation(before)
    return sums.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("small", [0, 20, 192], ids=["one by one", "both", "side by side"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@given(grouped_sequences())
@settings(max_examples=3, deadline=None)
def test_all_layouts_agree_in_log_probs_and_gradient(models, architecture, small, case):
    sequences, prompts = case
    model, n = models[architecture], len(sequences)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt_groups, "SMALL", small)
        expected, gradient = losses_and_gradient(model, collate(sequences), "sdpa", n)
        for shared in (range(n), prompts):
            sums, found = losses_and_gradient(model, pack(sequences, shared), ATTENTION, n)
            torch.testing.assert_close(sums, expected, atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(found, gradient, atol=3e-6 * float(gradient.abs().max()), rtol=1e-5)


def test_activation_checkpointing_changes_nothing(models):
    model = models["qwen2"]
    sequences, prompts = [([5, 6, 7], [8, 9]), ([5, 6, 7], [10]), ([11], [12, 13, 14])], [0, 0, 1]
    batch = pack(sequences, prompts)
    expected = losses_and_gradient(model, batch, ATTENTION, 3)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    try:
        found = losses_and_gradient(model, batch, ATTENTION, 3)
    finally:
        model.gradient_checkpointing_disable()
        model.eval()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_a_run_holds_every_prompt_once_and_no_pad():
    batch = pack([([5, 6, 7], [8, 9]), ([20], [21]), ([5, 6, 7], [10])], [0, 1, 0])
    assert batch.input_ids.tolist() == [[20, 21, 5, 6, 7, 8, 9, 10]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2, 3, 4, 3]]
    assert batch.targets.tolist() == [21, 8, 9, 10] and batch.rows.tolist() == [1, 0, 0, 2]
    assert batch.places.tolist() == [0, 4, 5, 4]  # both responses to 7 start from it


def test_groups_know_their_lengths_on_any_device():
    groups = PromptGroups([(2, 3), (100, 200, 300)])
    assert groups.to("cpu").lengths == groups.lengths and groups.n_small == 5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_auto_shares_prompts_where_the_model_can(models, architecture):
    model = models[architecture]
    try:
        assert choose_layout(model, "auto", best="shared_prompts") == "shared_prompts"
        assert model.config._attn_implementation == ATTENTION
    finally:
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("architecture", REFUSED)
def test_a_model_whose_attention_does_more_is_padded_or_refused_with_the_reason(architecture, capfd):
    config, reason = REFUSED[architecture]
    model = tiny_model(architecture, **config)
    before = model.config._attn_implementation
    assert choose_layout(model, "auto", best="shared_prompts") == "padded"
    assert reason in capfd.readouterr().err
    assert model.config._attn_implementation == before
    with pytest.raises(RequestError, match="Set layout: padded"):
        choose_layout(model, "packed", best="shared_prompts")


def test_a_layer_that_sees_less_than_everything_without_saying_how_much_is_refused():
    layer = torch.nn.Module()
    layer.config, layer.layer_idx = AutoConfig.for_model("qwen2", **TINY), 1
    layer.config.layer_types = ["full_attention", "chunked_attention"]
    part = torch.zeros(1, 4, 5, 8)
    with pytest.raises(UnsupportedAttention, match="layer 1 has chunked_attention"):
        attend(layer, part, part, part, None, prompt_groups=PromptGroups([(2, 3)]))


def test_rotary_frequencies_that_follow_the_longest_sequence_are_refused():
    with pytest.raises(RequestError, match=r"dynamic.*longest sequence"):
        choose_layout(tiny_model("llama", **DYNAMIC), "shared_prompts", best="packed")
