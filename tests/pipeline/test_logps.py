"""Token log-probs against transformers' own logits, on random models of several architectures."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.logps import ResponseLogps, collate, sequence_sums

TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES = {
    "qwen2": {},
    "llama": {"tie_word_embeddings": True},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 5.0},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
}


def tiny_model(architecture: str = "qwen2") -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **TINY, **ARCHITECTURES[architecture])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    # Random initialisation is nearly uniform; larger weights make positions and tokens differ visibly.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def sequences() -> list[tuple[list[int], list[int]]]:
    draw = torch.Generator().manual_seed(1)
    lengths = [(1, 1), (7, 12), (3, 1), (1, 9)]
    return [tuple(torch.randint(3, 61, (n,), generator=draw).tolist() for n in pair) for pair in lengths]


def by_transformers(model: torch.nn.Module, prompt: list[int], response: list[int]) -> torch.Tensor:
    ids = torch.tensor([prompt + response])
    logps = model(ids).logits[0].float().log_softmax(-1)
    return torch.stack([logps[len(prompt) + i - 1, token] for i, token in enumerate(response)])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_padded_chunked_logps_equal_transformers_one_by_one(architecture, chunk):
    model = tiny_model(architecture)
    expected = torch.cat([by_transformers(model, *sequence) for sequence in sequences()])
    assert expected.std() > 0.05  # else a shift by one would go unnoticed
    torch.testing.assert_close(ResponseLogps(model, chunk)(*collate(sequences())), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 5])
def test_gradients_equal_those_of_full_logits(chunk):
    model = tiny_model()
    torch.cat([by_transformers(model, *sequence) for sequence in sequences()]).pow(2).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    ResponseLogps(model, chunk)(*collate(sequences())).pow(2).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name], atol=2e-3, rtol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_logits_of_one_chunk_only_exist_at_once(monkeypatch):
    seen = []
    original = torch.nn.functional.linear

    def linear(x, weight, bias=None):
        if weight.shape[0] == TINY["vocab_size"]:
            seen.append(x.shape[0])
        return original(x, weight, bias)

    monkeypatch.setattr("pipeline.logps.F.linear", linear)
    ResponseLogps(tiny_model(), 4)(*collate(sequences())).sum().backward()
    assert max(seen) == 4


def test_sums_go_to_their_own_sequences():
    batch = collate(sequences())
    sums = sequence_sums(torch.arange(len(batch.rows), dtype=torch.float32), batch.rows, 4)
    # responses of 1, 12, 1 and 9 tokens: 0 | 1..12 | 13 | 14..22
    assert sums.tolist() == [0.0, 78.0, 13.0, 162.0]
