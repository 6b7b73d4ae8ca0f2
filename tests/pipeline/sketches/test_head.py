"""The output head's gradient from hidden states: against plain autograd through the head, and the gradient pass."""

import copy
from functools import lru_cache

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from cache import SketchIdentity
from pipeline.forward.head import ChunkedHead
from pipeline.forward.saved_head import head_parameters
from pipeline.params import SketchParams
from pipeline.reference.head_sketching import head_sketches
from pipeline.sketches.hashes import AUDIT, SKETCH
from pipeline.sketches.head import HeadSketcher
from pipeline.sketches.head_plan import HeadPlan
from pipeline.sketches.sketcher import Sketcher
from tests.pipeline.forward.test_logps import TINY, by_transformers, sequences
from tests.pipeline.sketches import slow_sketches

K, AUDIT_K, SEED = 64, 32, 3
slow_words = lru_cache(maxsize=None)(slow_sketches.words)
ARCHITECTURES = {
    "untied": ("qwen2", {"tie_word_embeddings": False}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "softcap": ("gemma2", {"head_dim": 8, "final_logit_softcapping": 5.0}),
    "scaled": ("granite", {"logits_scaling": 4.0}),
    "with bias": ("phi", {"tie_word_embeddings": False}),
}
PROMPT, RESPONSE = [5, 9, 11], [3, 7, 7, 3, 20, 41, 2]


@pytest.fixture(autouse=True)
def remembered_words(monkeypatch):
    """Whole numbers are slow."""
    monkeypatch.setattr(slow_sketches, "words", slow_words)


def tiny_model(name):
    torch.manual_seed(0)
    kind, changes = ARCHITECTURES[name]
    config = AutoConfig.for_model(kind, **TINY | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
        for parameter in model.get_output_embeddings().parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.requires_grad_(False)


def sketch(model, folder, prompt, response, chunk=1000):
    """Log-probs and sketch, from the states of transformers' own forward."""
    model.config.save_pretrained(folder)
    names, _ = head_parameters(folder)
    sketcher = HeadSketcher(ChunkedHead(model, chunk), HeadPlan(names, K, AUDIT_K, SEED))
    states = model.base_model(torch.tensor([[*prompt, *response]])).last_hidden_state[0, len(prompt) - 1 : -1]
    return sketcher(states, torch.tensor(response))


def head_gradients(model, prompt, response):
    """{attribute: gradient} of the head alone: in a copy whose head has weights of its own and alone is trained."""
    model = copy.deepcopy(model)
    head = model.get_output_embeddings()
    for attribute, parameter in list(head.named_parameters()):
        setattr(head, attribute, torch.nn.Parameter(parameter.detach().clone()))
    by_transformers(model, prompt, response).sum().backward()
    return {attribute: parameter.grad for attribute, parameter in head.named_parameters()}


def error(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("chunk", [2, 1000])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_is_the_sketch_of_the_heads_gradient_by_autograd(tmp_path, name, chunk):
    model = tiny_model(name)
    logps, found = sketch(model, tmp_path, PROMPT, RESPONSE, chunk)
    torch.testing.assert_close(logps, by_transformers(model, PROMPT, RESPONSE), rtol=1e-4, atol=1e-5)
    weight = "model.embed_tokens.weight" if model.config.tie_word_embeddings else "lm_head.weight"
    names = {"weight": weight, "bias": "lm_head.bias"}
    values, audit, squared = np.zeros(K), np.zeros(AUDIT_K), 0.0
    for attribute, gradient in head_gradients(model, PROMPT, RESPONSE).items():
        values += slow_sketches.slow_sketch(names[attribute], gradient, K, seed=SEED, purpose=SKETCH)
        audit += slow_sketches.slow_sketch(names[attribute], gradient, AUDIT_K, seed=SEED, purpose=AUDIT)
        squared += gradient.double().square().sum().item()
    assert error(found.values, values) < 1e-4 and error(found.audit, audit) < 1e-4
    assert found.grad_norm == pytest.approx(squared**0.5, rel=1e-4)


@pytest.mark.parametrize("response", [RESPONSE, RESPONSE * 8], ids=["short", "longer than the head is wide"])
@pytest.mark.parametrize("chunk", [2, 1000])
def test_of_a_head_of_its_own_it_is_the_gradient_pass_s_head(tmp_path, chunk, response):
    model = tiny_model("untied")
    _, found = sketch(model, tmp_path, PROMPT, response, chunk)
    params = SketchParams(mode="tensorsketch", k=K, audit=AUDIT_K, seed=SEED)
    with Sketcher(model, params, "head") as sketcher:
        wanted = sketcher([(PROMPT, response)])
    assert set(wanted.values) == {"head"}
    assert error(found.values, wanted.values["head"][0].numpy()) < 1e-4
    assert error(found.audit, wanted.audit[0].numpy()) < 1e-4
    assert found.grad_norm == pytest.approx(wanted.grad_norm.item(), rel=1e-4)


@pytest.mark.parametrize("chunk", [2, 1000])
def test_log_probs_are_the_same_bits_with_and_without_a_sketch(tmp_path, chunk):
    model = tiny_model("untied")
    logps, _ = sketch(model, tmp_path, PROMPT, RESPONSE, chunk)
    states = model.base_model(torch.tensor([PROMPT + RESPONSE])).last_hidden_state[0, len(PROMPT) - 1 : -1]
    assert torch.equal(logps, ChunkedHead(model, chunk)(states, torch.tensor(RESPONSE)))


class Largest(TorchDispatchMode):
    """Elements of the largest array that an operation gave."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        found = function(*arguments, **(options or {}))
        if isinstance(found, torch.Tensor):
            self.elements = max(self.elements, found.numel())
        return found


def test_vocabulary_wide_arrays_exist_for_one_chunk_only():
    draw, vocabulary, width, tokens, chunk = torch.Generator().manual_seed(0), 5000, 8, 60, 4
    config = AutoConfig.for_model("qwen2", **TINY | {"vocab_size": vocabulary, "hidden_size": width})
    head = ChunkedHead(AutoModelForCausalLM.from_config(config).requires_grad_(False), chunk)
    sketcher = HeadSketcher(head, HeadPlan({"weight": "lm_head.weight"}, K, AUDIT_K, SEED))
    states = torch.randn(tokens, width, generator=draw)
    with Largest() as largest:
        sketcher(states, torch.randint(vocabulary, (tokens,), generator=draw))
    assert largest.elements <= vocabulary * max(chunk, width)


def test_the_identity_says_that_an_engine_took_the_head_or_its_part_of_a_tied_weight(tmp_path):
    params = SketchParams(mode="tensorsketch", source="engine", k=K, audit=AUDIT_K, seed=SEED)
    digests = {"weights": "a1" * 16, "config": "b2" * 16}
    found = {}
    for name in ("untied", "tied"):
        tiny_model(name).config.save_pretrained(tmp_path / name)
        found[name] = head_sketches(tmp_path / name, params, **digests)
    untied, tied = found["untied"], found["tied"]
    assert (untied.identity.source, untied.identity.trainable, untied.identity.widths) == (
        "engine",
        '"head"',
        {"head": K},
    )
    assert tied.identity.trainable == '{"head_part":"model.embed_tokens.weight"}'
    assert tied.identity.widths == {"head_part": K} and tied.tied and not untied.tied
    assert untied.plan.names == {"weight": "lm_head.weight"}
    by_gradient = {**untied.identity.to_dict(), "source": None}
    assert untied.identity.reference_id != SketchIdentity.from_dict(by_gradient).reference_id


def test_sequences_of_every_length_are_sketched(tmp_path):
    """One token, and a prompt of one token, as they come in data."""
    model = tiny_model("tied")
    for prompt, response in sequences():
        _, found = sketch(model, tmp_path, prompt, response)
        (gradient,) = head_gradients(model, prompt, response).values()
        assert found.grad_norm == pytest.approx(gradient.norm().item(), rel=1e-4)
