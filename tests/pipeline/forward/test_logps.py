"""Token log-probs against transformers' own logits, on random models of several architectures."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.forward.head import ChunkedHead
from pipeline.forward.logps import ResponseLogps, collate, sequence_sums

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


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])  # head and embeddings tied, and not
def test_gradients_accumulated_in_place_are_autograds_own(architecture):
    """Over two micro-batches, and again when the gradients were dropped."""

    def gradients(in_place: bool) -> list[dict[str, torch.Tensor]]:
        logps = ResponseLogps(tiny_model(architecture), 5)
        if in_place:
            logps.accumulate_in_place()
        found = []
        for _ in range(2):
            for micro_batch in (sequences()[:2], sequences()[2:]):
                logps(*collate(micro_batch)).pow(2).sum().backward()
            found.append({name: p.grad.clone() for name, p in logps.named_parameters()})
            logps.zero_grad()
        return found

    for ours, plain in zip(gradients(True), gradients(False), strict=True):
        assert ours.keys() == plain.keys()
        for name, expected in plain.items():
            torch.testing.assert_close(ours[name], expected, atol=2e-3, rtol=2e-4)


class AsLarge(TorchDispatchMode):
    """Collects where the arrays with the shape of `weight` lie, `weight` left out."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.storages = weight, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.shape == self.weight.shape and not tensor.is_sparse:
                self.storages.add(tensor.untyped_storage().data_ptr())
        self.storages.discard(self.weight.untyped_storage().data_ptr())
        return result


def test_no_array_as_large_as_tied_weights_is_made_beside_their_gradient_in_two_micro_batches():
    logps = ResponseLogps(tiny_model("llama"), 5)
    logps.accumulate_in_place()
    with AsLarge(logps.head.weight) as made:
        for _ in range(2):
            logps(*collate(sequences())).sum().backward()
    assert made.storages == {logps.head.weight.grad.untyped_storage().data_ptr()}


class VocabularyWide(TorchDispatchMode):
    """Collects the rows of every array as wide as the vocabulary but the weights, and where the arrays lie."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.vocabulary, self.weight, self.rows, self.storages = len(weight), weight.data_ptr(), [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if not isinstance(tensor, torch.Tensor) or tensor.ndim != 2 or tensor.shape[1] != self.vocabulary:
                continue
            if (storage := tensor.untyped_storage().data_ptr()) != self.weight:
                self.rows.append(len(tensor))
                self.storages.add(storage)
        return result


@pytest.mark.parametrize("trained", [True, False])
def test_logits_of_one_chunk_only_exist_at_once_and_in_one_array_for_all_chunks(trained):
    hidden = torch.randn(23, 8, requires_grad=True)
    head = ChunkedHead(tiny_head("qwen2", torch.float32), 4)
    head.requires_grad_(trained)
    # Both passes apart, since the second may get the memory of the first.
    with VocabularyWide(head.weight) as forward:
        logps = head(hidden, torch.arange(23))
    with VocabularyWide(head.weight) as backward:
        logps.sum().backward()
    assert max(forward.rows) == 4 and len(forward.storages) == 1
    if trained:
        assert max(backward.rows) == 4 and len(backward.storages) == 1
    else:
        assert not backward.rows  # a frozen head computes no logits twice


def tiny_head(architecture: str, dtype: torch.dtype, *, bias: bool = False) -> torch.nn.Module:
    """What ChunkedHead needs of a model: its output layer and its config. 8 wide, 61 tokens."""
    torch.manual_seed(0)
    output = torch.nn.Linear(8, 61, bias=bias, dtype=dtype)
    config = AutoConfig.for_model(architecture, **TINY, **ARCHITECTURES[architecture])
    shell = torch.nn.Module()
    shell.config, shell.get_output_embeddings = config, lambda: output
    return shell


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", [True, False])
def test_head_gradients_are_those_of_finite_differences(architecture, bias, trained):
    head = ChunkedHead(tiny_head(architecture, torch.float64, bias=bias), 3).requires_grad_(trained)
    hidden = torch.randn(7, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 60, 5, 5, 17, 33, 2])
    inputs = [hidden, *head.parameters()] if trained else [hidden]
    assert torch.autograd.gradcheck(lambda *_: head(hidden, targets), inputs, fast_mode=True)


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_a_frozen_head_or_decoder_gets_no_gradient_and_the_other_its_own(frozen):
    head = ChunkedHead(tiny_head("qwen2", torch.float32), 3)
    hidden, targets = torch.randn(7, 8), torch.arange(7)

    def gradient(forward) -> torch.Tensor:
        states = hidden.clone().requires_grad_(frozen != "hidden")
        head.weight.grad = None
        head.weight.requires_grad_(frozen != "head")
        forward(states).pow(2).sum().backward()
        found, other = (states, head.weight) if frozen == "head" else (head.weight, states)
        assert other.grad is None
        return found.grad

    def plain(states: torch.Tensor) -> torch.Tensor:
        return (states @ head.weight.T).log_softmax(-1)[torch.arange(7), targets]

    torch.testing.assert_close(gradient(lambda states: head(states, targets)), gradient(plain), atol=1e-5, rtol=1e-5)


def test_bf16_logits_are_summed_in_float32():
    """Against the same bf16 products, all else in float64: what is left is float32 rounding, not bf16's."""
    head = ChunkedHead(tiny_head("qwen2", torch.bfloat16), 3)
    hidden, targets = torch.randn(7, 8, dtype=torch.bfloat16), torch.arange(7)
    expected = (hidden @ head.weight.T).double().log_softmax(-1)[torch.arange(7), targets]
    torch.testing.assert_close(head(hidden, targets), expected.float(), atol=1e-5, rtol=1e-6)


def test_sums_go_to_their_own_sequences():
    batch = collate(sequences())
    sums = sequence_sums(torch.arange(len(batch.rows), dtype=torch.float32), batch.rows, 4)
    # responses of 1, 12, 1 and 9 tokens: 0 | 1..12 | 13 | 14..22
    assert sums.tolist() == [0.0, 78.0, 13.0, 162.0]
