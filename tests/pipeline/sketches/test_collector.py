"""One backward per batch gives the sketch of every example's exact gradient, whatever the parameter and the batch."""

import copy
from functools import lru_cache

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.errors import RequestError, RunFailed
from pipeline.model.parts import canonical_name
from pipeline.params import LastFraction, Lora, LoraShape, SketchParams
from pipeline.sketches import collector as sketch_collection
from pipeline.sketches import sums as sketch_maths
from pipeline.sketches.hashes import AUDIT, SKETCH
from pipeline.sketches.sketcher import Sketcher
from tests.pipeline.forward.test_logps import TINY, sequences
from tests.pipeline.sketches import slow_sketches

K, AUDIT_K, SEED = 64, 32, 3
slow_sketches.words = lru_cache(maxsize=None)(slow_sketches.words)  # whole numbers are slow
ARCHITECTURES = {
    "qwen2": {},  # biases; a head of its own
    "qwen3": {"head_dim": 8, "tie_word_embeddings": True},  # norms of queries and keys
    "llama": {"tie_word_embeddings": True},
    "gemma": {"head_dim": 8},  # scaled embeddings, norms of 1 + w
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 5.0},
    "gemma3_text": {"head_dim": 8},
    "granite": {"logits_scaling": 4.0},
    "stablelm": {},  # LayerNorm with bias
}
LORA = Lora(lora=LoraShape(r=2, alpha=4, targets=["q_proj", "down_proj"], seed=1))


def tiny_model(architecture: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **TINY, **ARCHITECTURES.get(architecture, {}))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))  # biases are zero and norms one at first
    return model


def make_sketcher(architecture, trainable, **settings):
    params = SketchParams(**{"mode": "tensorsketch", "k": K, "audit": AUDIT_K, "seed": SEED} | settings)
    return Sketcher(tiny_model(architecture), params, trainable)


def expected(sketcher, sequence):
    """{group: sketch}, audit and norm of one response's exact gradient, by the slow implementation."""
    groups, audit, squared = {}, np.zeros(AUDIT_K), 0.0
    for raw, gradient in slow_sketches.exact_gradients(sketcher.model, *sequence).items():
        name = canonical_name(raw)
        group = sketcher.parts.groups[name]
        sketch = slow_sketches.slow_sketch(name, gradient, K, seed=SEED, purpose=SKETCH)
        groups[group] = groups.get(group, 0) + sketch
        audit += slow_sketches.slow_sketch(name, gradient, AUDIT_K, seed=SEED, purpose=AUDIT)
        squared += gradient.double().square().sum().item()
    return groups, audit, squared**0.5


def error(found, wanted):
    return np.linalg.norm(found.double().numpy() - wanted) / np.linalg.norm(wanted)


def require_exact(sketcher, rows=None):
    rows = sequences() if rows is None else rows
    with sketcher:
        found = sketcher(rows)
    for i, sequence in enumerate(rows):
        groups, audit, norm = expected(sketcher, sequence)
        assert set(groups) == set(found.values)
        for group, wanted in groups.items():
            assert error(found.values[group][i], wanted) < 1e-4, (group, i)
        assert error(found.audit[i], audit) < 1e-4
        assert abs(found.grad_norm[i].item() / norm - 1) < 1e-4
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sketches_of_all_parameters_are_those_of_the_exact_gradient(architecture):
    sketcher = make_sketcher(architecture, "all")
    require_exact(sketcher)
    names = {canonical_name(name) for name, _ in sketcher.model.named_parameters()}
    assert set(sketcher.parts.groups) == names
    assert {"block_000", "block_001", "embeddings", "final_norm"} <= set(sketcher.parts.groups.values())


@pytest.mark.parametrize("trainable", ["last_block", "head", LastFraction(last_fraction=1.0), LORA], ids=str)
@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_sketches_of_a_part_are_those_of_the_exact_gradient(architecture, trainable):
    require_exact(make_sketcher(architecture, trainable))


@pytest.mark.parametrize("trainable", ["all", "last_block", LORA], ids=str)
def test_activation_checkpointing_changes_nothing(trainable):
    found = require_exact(make_sketcher("llama", trainable, activation_checkpointing=True))
    with make_sketcher("llama", trainable) as sketcher:
        torch.testing.assert_close(found, sketcher(sequences()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("by_tokens", [True, False])
@pytest.mark.parametrize("chunk", [1, 5000, 1 << 22])
def test_the_gradient_is_sketched_alike_with_and_without_being_written_out(monkeypatch, by_tokens, chunk):
    for module in (sketch_collection, sketch_maths):
        monkeypatch.setattr(module, "CHUNK_NUMBERS", chunk)
    monkeypatch.setattr(sketch_collection, "by_tokens_is_cheaper", lambda *_: by_tokens)
    require_exact(make_sketcher("qwen2", "all"))


def test_an_odd_k_wraps_around_as_well():
    with make_sketcher("llama", "last_block", k=33) as sketcher:
        found = sketcher(sequences()[:1])
    wanted = sum(
        slow_sketches.slow_sketch(canonical_name(name), gradient, 33, seed=SEED, purpose=SKETCH)
        for name, gradient in slow_sketches.exact_gradients(sketcher.model, *sequences()[0]).items()
    )
    assert error(found.values["block_001"][0], wanted) < 1e-4


@pytest.mark.parametrize("trainable", ["all", LORA], ids=str)
def test_neither_padding_nor_the_order_of_the_batch_changes_a_sketch(trainable):
    rows = sequences()
    with make_sketcher("gemma2", trainable) as sketcher:
        together, reverse = sketcher(rows), sketcher(rows[::-1])
        for i, row in enumerate(rows):
            alone = sketcher([row])
            for group, values in together.values.items():
                scale = values[i].norm().item()
                torch.testing.assert_close(values[i], alone.values[group][0], rtol=0, atol=1e-5 * scale)
                torch.testing.assert_close(values[i], reverse.values[group][-1 - i], rtol=0, atol=1e-5 * scale)
            torch.testing.assert_close(together.grad_norm[i], alone.grad_norm[0], rtol=1e-5, atol=0)
            torch.testing.assert_close(together.sum_logp[i], alone.sum_logp[0], rtol=1e-5, atol=0)


def test_a_token_that_torch_calls_padding_gets_no_gradient_here_either():
    """Models whose pad token also occurs in texts: torch leaves its embedding out, so the exact gradient does."""
    sketcher = make_sketcher("llama", "all")
    assert sketcher.model.get_input_embeddings().padding_idx == 0
    require_exact(sketcher, [([5, 0, 7], [0, 9, 0, 2])])


@pytest.mark.parametrize("trainable", ["last_block", LORA], ids=str)
def test_exact_mode_stores_the_gradient_itself(trainable):
    sketcher = make_sketcher("llama", trainable, mode="exact")
    with sketcher:
        found = sketcher(sequences())
    assert {group: v.shape[1] for group, v in found.values.items()} == sketcher.widths
    for i, sequence in enumerate(sequences()):
        groups: dict[str, list[torch.Tensor]] = {}
        for raw, gradient in slow_sketches.exact_gradients(sketcher.model, *sequence).items():
            if "lora_A" in raw:
                assert not gradient.any()  # B is zero
            else:
                groups.setdefault(sketcher.parts.groups[canonical_name(raw)], []).append(gradient.flatten())
        for group, parts in groups.items():
            assert error(found.values[group][i], torch.cat(parts).double().numpy()) < 1e-5
        audit, norm = expected(sketcher, sequence)[1:]
        assert error(found.audit[i], audit) < 1e-4 and abs(found.grad_norm[i].item() / norm - 1) < 1e-4


def test_blocks_below_the_lowest_trainable_one_build_no_graph():
    sketcher = make_sketcher("llama", "last_block")
    grows = {}
    for number, block in enumerate(sketcher.model.model.layers):
        block.register_forward_hook(
            lambda _, args, output, n=number: grows.update({n: (args[0].requires_grad, output.requires_grad)})
        )
    with sketcher:
        sketcher(sequences())
    assert grows == {0: (False, False), 1: (False, True)}


def test_no_parameter_gets_a_gradient_and_the_model_is_left_as_it_was():
    sketcher = make_sketcher("qwen2", "all")
    plain = copy.deepcopy(sketcher.model)
    with sketcher:
        sketcher(sequences())
        assert all(parameter.grad is None for parameter in sketcher.model.parameters())
    assert not any("forward" in vars(module) for module in sketcher.model.modules())
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(sketcher.model(ids).logits, plain(ids).logits)


def test_sum_logps_are_those_of_the_model():
    with make_sketcher("gemma2", "last_block") as sketcher:
        found = sketcher(sequences()).sum_logp
    for (prompt, response), value in zip(sequences(), found.tolist(), strict=True):
        logps = sketcher.model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        wanted = sum(logps[len(prompt) - 1 + i, token].item() for i, token in enumerate(response))
        assert value == pytest.approx(wanted, rel=1e-5)


# refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "named"),
    [
        ("cohere", "model.layers.0.input_layernorm (CohereLayerNorm: weight)"),
        ("qwen2_moe", "experts (Qwen2MoeExperts: "),
        ("gpt2", "transformer.h.0.attn.c_attn (Conv1D: weight, bias)"),
    ],
)
def test_modules_that_cannot_be_sketched_are_named(architecture, named):
    small = {"num_experts": 4, "moe_intermediate_size": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
    config = AutoConfig.for_model(architecture, **TINY, **small)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with pytest.raises(RequestError) as caught:
        Sketcher(model, SketchParams(mode="tensorsketch", k=K), "all")
    assert named in str(caught.value) and "can't be sketched" in str(caught.value)


def test_the_parts_of_such_a_model_that_can_be_sketched_still_are():
    require_exact(make_sketcher("cohere", LORA))


def test_a_weight_shared_by_two_layers_is_named():
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(RequestError, match=r"layers\.0\.mlp\.up_proj\.weight \(shared by 2 modules\)"):
        Sketcher(model, SketchParams(mode="tensorsketch", k=K), "all")


def test_a_layer_used_twice_or_past_its_module_is_a_failure_not_a_wrong_sketch():
    for change in ("twice", "past"):
        sketcher = make_sketcher("llama", "last_block")
        mlp = sketcher.model.model.layers[1].mlp
        plain = mlp.forward
        if change == "twice":
            mlp.forward = lambda x, plain=plain: plain(x) + plain(2 * x)
        else:
            mlp.forward = lambda x, plain=plain, mlp=mlp: plain(x) + x @ mlp.down_proj.weight @ mlp.up_proj.weight
        with pytest.raises(RunFailed, match=r"layers\.1\.mlp\.\w+_proj\.weight"), sketcher:
            sketcher(sequences())


def test_a_gradient_that_is_not_finite_is_a_failure():
    sketcher = make_sketcher("llama", "last_block")
    with torch.no_grad():
        sketcher.model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(RunFailed, match="not finite"), sketcher:
        sketcher(sequences())


def test_exact_gradients_of_a_large_part_are_refused_with_the_number(monkeypatch):
    monkeypatch.setattr("pipeline.sketches.sketcher.LARGEST_EXACT", 1000)
    with pytest.raises(RequestError, match=r"[\d,]+ numbers a response, at most 1,000.*tensorsketch"):
        make_sketcher("llama", "last_block", mode="exact")
