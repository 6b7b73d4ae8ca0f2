"""What a LoRA lies on is what was asked for, for every architecture, or nothing is trained."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.errors import RequestError
from pipeline.params import Lora, LoraShape
from pipeline.trainable.selection import select_trainable
from pipeline.trainable.targets import count_adapted
from tests.pipeline.forward.test_logps import TINY as SHAPE

OWN = {
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}
# The layers of a block, from the architectures' papers and sources: attention, and what follows it.
LAYERS = {
    "qwen2": ("q_proj k_proj v_proj o_proj", "gate_proj up_proj down_proj"),
    "phi3": ("qkv_proj o_proj", "gate_up_proj down_proj"),
    "gpt2": ("c_attn c_proj", "c_fc c_proj"),
    "gpt_neox": ("query_key_value dense", "dense_h_to_4h dense_4h_to_h"),
    "falcon": ("query_key_value dense", "dense_h_to_4h dense_4h_to_h"),
    "opt": ("q_proj k_proj v_proj out_proj", "fc1 fc2"),
}
MIXTURES = ["qwen3_moe", "mixtral"]


def adapt(architecture: str, **shape):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **SHAPE | OWN.get(architecture, {})))
    return select_trainable(model, Lora(lora=LoraShape(r=2, **shape)))


def refusal(architecture: str, **shape) -> str:
    with pytest.raises(RequestError) as error:
        adapt(architecture, **shape)
    return str(error.value)


def blocks_of(model) -> set[int]:
    trained = [name.split(".") for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {int(part) for name in trained for part in name if part.isdigit()}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # peft corrects it for GPT-2's layers by itself
@pytest.mark.parametrize("architecture", LAYERS)
def test_groups_are_the_architectures_own_layers(architecture):
    attention, mlp = (part.split() for part in LAYERS[architecture])
    assert set(count_adapted(adapt(architecture, targets="attention"))) == set(attention)
    assert set(count_adapted(adapt(architecture, targets="mlp"))) == set(mlp)
    both = count_adapted(adapt(architecture, targets="all-linear"))
    assert set(both) == {*attention, *mlp} and sum(both.values()) == 2 * len(attention + mlp)


@pytest.mark.parametrize("targets", ["attention", "mlp", ["q_proj", "down_proj"]])
def test_the_last_block_is_the_last_block_alone(targets):
    assert blocks_of(adapt("qwen2", targets=targets, blocks="last")) == {1}
    assert blocks_of(adapt("qwen2", targets=targets)) == {0, 1}


@pytest.mark.parametrize("architecture", MIXTURES)
def test_attention_of_a_mixture_of_experts_leaves_experts_and_routers_alone(architecture):
    model = adapt(architecture, targets=["q_proj"], blocks="last")
    assert blocks_of(model) == {1} and count_adapted(model) == {"q_proj": 1}


@pytest.mark.parametrize("targets", ["mlp", "all-linear", ["q_proj", "gate_proj", "up_proj", "down_proj"]])
@pytest.mark.parametrize("architecture", [*MIXTURES, "qwen2_moe"])
def test_fused_experts_are_refused_by_name(architecture, targets):
    """Also where a shared expert has layers of these names: they are not what was meant."""
    assert "experts.gate_up_proj" in refusal(architecture, targets=targets, blocks="last")


def test_experts_within_attention_are_refused_there_too():
    assert "self_attention.experts" in refusal("jetmoe", targets="attention")


def test_a_layer_that_chooses_experts_is_in_no_group():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE))
    model.model.layers[0].mlp.gate = torch.nn.Linear(32, 4)  # as in mixtures whose experts are layers
    adapted = count_adapted(select_trainable(model, Lora(lora=LoraShape(targets="all-linear"))))
    assert adapted.keys() == set(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])


def test_a_shared_expert_can_be_named():
    assert count_adapted(adapt("qwen2_moe", targets=["shared_expert.up_proj"])) == {"up_proj": 2}


@pytest.mark.parametrize(
    ("architecture", "targets", "missing"),
    [("qwen2", ["q_proj", "vproj"], "vproj"), ("phi3", ["q_proj", "k_proj", "v_proj", "o_proj"], "q_proj")],
)
def test_a_target_that_matches_nothing_is_named_with_the_models_own_layers(architecture, targets, missing):
    message = refusal(architecture, targets=targets)
    assert repr(missing) in message
    assert all(name in message for part in LAYERS[architecture] for name in part.split())


def test_the_output_head_is_refused():
    assert "trainable: head" in refusal("qwen2", targets=["q_proj", "lm_head"])
