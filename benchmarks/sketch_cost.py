"""What gradient sketches cost: taking them, against a plain forward and backward; constraining by them, against a step.

    OMP_NUM_THREADS=1 python benchmarks/sketch_cost.py --out benchmarks/results/DATE-sketch-cost.md

Random Qwen2 models and tokens: neither changes what is computed. Every case runs in a process of its own, in CPU
seconds of one thread (on a GPU: seconds, synchronised), the median of --repeats after one run to warm up. The
per-batch penalty is the paper's, computed while training: gradients of the reference through the offsets.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

# The first is the model of presets/gsm8k-from-scratch.yaml.
MODELS: dict[str, dict[str, Any]] = {
    "6 M": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "vocab_size": 4096},
    "27 M": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "vocab_size": 8192},
    "0.5 B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "vocab_size": 151_936},
}
TRAINABLES = {"all": "all", "last 25 %": {"last_fraction": 0.25}, "last block": "last_block", "head": "head"}
GOALS = {"sketch": 1.6, "step": 1.05}


def build(name: str) -> Any:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    heads = max(2, MODELS[name]["hidden_size"] // 64)
    shape = {"num_attention_heads": heads, "num_key_value_heads": heads // 2, "tie_word_embeddings": True}
    config = Qwen2Config(**MODELS[name], **shape, max_position_embeddings=1024)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # drawing on a CPU would take longest of all
        return Qwen2ForCausalLM(config).eval()


def sequences(options: argparse.Namespace, vocabulary: int, rows: int) -> list[tuple[list[int], list[int]]]:
    import numpy as np

    draw = np.random.default_rng(0)
    tokens = draw.integers(3, vocabulary, (rows, options.prompt + options.response)).tolist()
    return [(row[: options.prompt], row[options.prompt :]) for row in tokens]


def clock() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def median_seconds(repeats: int, work: Callable[[], Any]) -> float:
    work()
    found = []
    for _ in range(repeats):
        began = clock()
        work()
        found.append(clock() - began)
    return statistics.median(found)


def sum_logps(model: Any, rows: list[tuple[list[int], list[int]]]) -> Any:
    """Summed response log-probs, (rows,), all of one length; whole logits."""
    import torch

    device = next(model.parameters()).device
    ids = torch.tensor([prompt + response for prompt, response in rows], device=device)
    start = len(rows[0][0])
    logps = model(input_ids=ids).logits[:, start - 1 : -1].log_softmax(-1)
    return logps.gather(-1, ids[:, start:, None]).sum(dim=(1, 2))


def plain(options: argparse.Namespace, name: str, part: str) -> float:
    """Forward and backward of what trains, seconds a token: a DPO step without its optimiser."""
    from pipeline.trainable.selection import select_trainable

    model = select_trainable(build(name), trainable_of(part))
    rows = sequences(options, model.config.vocab_size, options.rows)

    def work() -> None:
        model.zero_grad()
        sum_logps(model, rows).sum().backward()

    return median_seconds(options.repeats, work) / token_count(options, options.rows)


def trainable_of(part: str) -> Any:
    from pydantic import TypeAdapter

    from pipeline.params import Trainable

    return TypeAdapter(Trainable).validate_python(TRAINABLES[part])


def sketch(options: argparse.Namespace, name: str, part: str, k: int) -> tuple[float, int]:
    """Seconds a token, and numbers a response."""
    from pipeline.params import SketchParams
    from pipeline.sketches.sketcher import Sketcher

    model = build(name)
    sketcher = Sketcher(model, SketchParams(mode="tensorsketch", k=k), trainable_of(part))
    rows = sequences(options, model.config.vocab_size, options.rows)
    with sketcher:
        seconds = median_seconds(options.repeats, lambda: sketcher(rows))
    return seconds / token_count(options, options.rows), sum(sketcher.widths.values())


def penalty(options: argparse.Namespace, responses: int, width: int) -> float:
    """The global penalty and its gradient, seconds a step."""
    import torch

    from pipeline.auxdpo.nullspace import SketchedGradients

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = torch.randn(responses, width)
    gradients = SketchedGradients(found, torch.zeros(responses, 1), torch.ones(responses), device)
    coefficients = torch.randn(responses, device=device)
    return median_seconds(options.repeats, lambda: gradients.penalty(coefficients))


def on_the_fly(options: argparse.Namespace, name: str) -> float:
    """The paper's penalty over a batch: a forward, a backward through it, and one through that, seconds."""
    import torch

    model = build(name)
    rows = sequences(options, model.config.vocab_size, 2 * options.pairs)
    parameters = list(model.parameters())

    def work() -> None:
        for start in range(0, len(rows), options.rows):
            some = rows[start : start + options.rows]
            delta = torch.randn(len(some), device=parameters[0].device, requires_grad=True)
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the others have one derivative
                total = torch.autograd.grad(delta @ sum_logps(model, some), parameters, create_graph=True)
                torch.autograd.grad(sum(part.square().sum() for part in total), delta)

    return median_seconds(options.repeats, work)


def token_count(options: argparse.Namespace, rows: int) -> int:
    return rows * (options.prompt + options.response)


# ----------------------------------------------------------------------------------------------------------------------


def _child(pipe: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch

    from pipeline.training.record import peak_bytes

    torch.set_num_threads(1)
    found = function(*arguments)
    pipe.send((found, peak_bytes() / 2**20))


def alone(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """(what it returns, peak resident MiB) in a process of its own."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        found: tuple[Any, float] = ours.recv()
    finally:
        process.join()
    return found


def measure(options: argparse.Namespace, name: str) -> list[str]:
    lines, widths = [f"## {name} parameters", ""], {}
    lines += ["| sketched | k | of a plain forward and backward of all | µs a token | bytes a response | peak MiB |"]
    lines += ["|---|---:|---:|---:|---:|---:|"]
    base, peak = alone(plain, options, name, "all")
    lines.append(f"| (plain forward and backward of all) | | 1 | {base * 1e6:.0f} | | {peak:,.0f} |")
    for part, k in [*((part, options.k) for part in TRAINABLES), *(("all", k) for k in options.other_k)]:
        (seconds, width), peak = alone(sketch, options, name, part, k)
        widths.setdefault(part, width)
        stored = 2 * (width + 256) + 20
        row = (part, f"{k:,}", f"{seconds / base:.2f}", f"{seconds * 1e6:.0f}", f"{stored:,}", f"{peak:,.0f}")
        lines.append("| " + " | ".join(row) + " |")
        print(lines[-1], flush=True)
    lines += ["", f"| constraint ({options.pairs} pairs a step) | trainable | of DPO's step | ms more |"]
    lines += ["|---|---|---:|---:|"]
    for part in ("all", "last block"):
        one = alone(plain, options, name, part)[0] * token_count(options, 2 * options.pairs)
        for responses in options.responses:
            more, _ = alone(penalty, options, responses, widths[part])
            lines.append(f"| global, {responses:,} responses | {part} | {1 + more / one:.3f} | {more * 1e3:.1f} |")
            print(lines[-1], flush=True)
    more, _ = alone(on_the_fly, options, name)
    one = base * token_count(options, 2 * options.pairs)
    lines.append(f"| per batch, gradients taken on the fly | all | {1 + more / one:.2f} | {more * 1e3:,.0f} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["6 M", "27 M"])
    parser.add_argument("--prompt", type=int, default=100, help="tokens")
    parser.add_argument("--response", type=int, default=80, help="tokens")
    parser.add_argument("--rows", type=int, default=8, help="sequences in one forward")
    parser.add_argument("--pairs", type=int, default=32, help="in one training step")
    parser.add_argument("--responses", type=int, nargs="+", default=[4_000, 20_000], help="of the data set")
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--other-k", type=int, nargs="*", default=[256, 4096])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    left = [name for name in MODELS if name not in options.models]
    lines = [
        f"# Cost of gradient sketches, {options.out.name[:10]}",
        "",
        f"`python {' '.join(['benchmarks/sketch_cost.py', *sys.argv[1:]])}`",
        "",
        f"CPU seconds of one thread. Sequences of {options.prompt} + {options.response} tokens, {options.rows} in a "
        "forward, float32, random Qwen2 models, tied embeddings. A step is taken as the forward and backward of its "
        f"pairs, without optimiser. Goals: sketching all at most {GOALS['sketch']} times a plain forward and backward, "
        f"an AuxDPO step at most {GOALS['step']} times DPO's. Not run: {', '.join(left) or 'none'}.",
        "",
    ]
    for name in options.models:
        lines += measure(options, name)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
