"""Part `kernels`: attention in one call and Liger's layers against the plain ones: speed, error, some layers deep."""

import statistics
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils.import_utils import is_liger_kernel_available

from benchmarks.gpu.child import Sizes, device, emit, forget_peak, free_memory, now, parse, peak_bytes, skip
from benchmarks.gpu.lengths import read_lengths, shortened
from pipeline.forward.kernels import answers, use_flex, use_liger
from pipeline.forward.layout import ATTENTION
from pipeline.forward.logps import ResponseLogps, TokenBatch, pack

REPEATS = 5
DTYPES = ("float32", "bfloat16")


def batch_of(sizes: Sizes, data: str) -> TokenBatch:
    """About as many tokens as a micro-batch of the training parts, of both sides of pairs all along the quantiles."""
    bound = sizes.ours[0][0]
    prompts = shortened(read_lengths(data), sizes.divisor)
    generator = torch.Generator().manual_seed(0)
    sequences: list[tuple[list[int], list[int]]] = []
    groups: list[int] = []
    left = bound
    for number in torch.randperm(len(prompts), generator=generator).tolist():
        prompt, *sides = prompts[number]
        responses = [length for side in sides for length in side]
        if prompt + sum(responses) > left:
            continue
        left -= prompt + sum(responses)
        made = torch.randint(3, sizes.model["vocab_size"], (prompt + sum(responses),), generator=generator).tolist()
        start = prompt
        for length in responses:
            sequences.append((made[:prompt], made[start : start + length]))
            groups.append(number)
            start += length
    return pack(sequences, groups).to(device())


def model_of(sizes: Sizes, dtype: str) -> Any:
    torch.manual_seed(0)
    with device():
        model = Qwen2ForCausalLM(Qwen2Config(**sizes.model | {"num_hidden_layers": sizes.layers}))
    model.set_attn_implementation(ATTENTION)
    return model.bfloat16().to(getattr(torch, dtype))  # weights are rounded once, for both dtypes


def off(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def measure(sizes: Sizes, batches: dict[str, TokenBatch], exact: dict[str, Any], dtype: str, kernels: str) -> None:
    """exact: answers of the plain kernels in float32, which come first."""
    model = model_of(sizes, dtype)
    if "flex" in kernels:
        use_flex(model)
    if "liger" in kernels:
        use_liger(model)
    # On a CPU FlexAttention has no gradients.
    gradients = torch.cuda.is_available() or kernels == "plain"
    for data, batch in batches.items():
        seconds = []
        for repeat in range(2 + REPEATS):  # two to compile and warm up
            if repeat == 2:
                forget_peak()
            began = now()
            if gradients:
                found = answers(model, batch)
            else:
                with torch.no_grad():
                    parts = (batch.input_ids, batch.places, batch.position_ids, batch.groups)
                    found = (ResponseLogps(model, None).states(*parts).float(),)
            seconds.append(now() - began)
        exact.setdefault(data, found)
        errors = [off(ours, right) for ours, right in zip(found, exact[data], strict=False)]
        emit(
            "kernels",
            data=data,
            dtype=dtype,
            kernels=kernels,
            tokens=batch.input_ids.numel(),
            seconds=statistics.median(seconds[2:]),
            first_seconds=seconds[0],
            peak_bytes=peak_bytes(),
            hidden_states_off=errors[0],
            gradient_off=errors[1] if gradients else None,
        )
    del model, found
    free_memory()


def main() -> None:
    _, sizes = parse(__doc__)
    batches = {data: batch_of(sizes, data) for data in ("ultrafeedback", "gsm8k")}
    exact: dict[str, Any] = {}
    for kernels in ("plain", "flex"):
        for dtype in DTYPES:
            measure(sizes, batches, exact, dtype, kernels)
    if not (is_liger_kernel_available() and torch.cuda.is_available()):
        return skip("Liger's layers: liger-kernel is not installed, or there is no GPU")
    for kernels in ("liger", "flex + liger"):  # last: they stay in transformers' modules
        for dtype in DTYPES:
            measure(sizes, batches, exact, dtype, kernels)


if __name__ == "__main__":
    main()
