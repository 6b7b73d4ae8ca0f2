"""Part `train/trl`: TRL's DPOTrainer on the same pairs, by benchmarks/train_peers.py, at several micro-batch sizes.

Reference log-probs are precomputed, which is TRL's fastest way. Then its other kernels, where their packages are
installed, at the size that was fastest. Who fits and is fastest is read off the results.
"""

import argparse
import importlib.util
from typing import Any

import torch

from benchmarks.gpu.child import (
    Sizes,
    emit,
    free_memory,
    measured,
    parse,
    require_out_of_memory,
    skip,
    time_for_another,
)
from benchmarks.gpu.lengths import DATA
from benchmarks.gpu.training import BETA, LEARNING_RATE, ORDERS, pair_tokens
from pipeline.tokens.examples import open_examples

WARM_UP = 1


def installed(*names: str) -> bool:
    return all(importlib.util.find_spec(name) for name in names)


def others() -> list[dict[str, Any]]:
    """What TRL may be given beside PyTorch's own attention and transformers' own layers."""
    found: list[dict[str, Any]] = []
    if torch.cuda.is_available() and installed("liger_kernel"):
        found.append({"use_liger_kernel": True})
    if torch.cuda.is_available() and installed("flash_attn"):
        found.append({"attention": "flash_attention_2"})
    return found


def measure(pairs: list[Any], options: argparse.Namespace, sizes: Sizes, micro: int, extra: dict[str, Any]) -> float:
    """Emits the result; returns pair tokens a second, 0 where it doesn't fit."""
    from train_peers import train

    common = {"data": options.pairs.name, "contender": "trl", "setting": {"micro_batch_size": micro} | extra}
    try:
        found = train(pairs, options, micro=micro, steps=WARM_UP + sizes.steps, method="precompute", **extra)
    except RuntimeError as error:
        require_out_of_memory(error)
        found = None
    free_memory()  # outside of the handler, whose error holds the frames with all tensors
    if found is None:
        emit("training", fits=False, **common)
        return 0.0
    seconds = found["seconds"]
    examples = open_examples(options.pairs, "train")
    tokens = pair_tokens(examples, options.pairs.name, options.batch_size, range(WARM_UP, len(seconds)))
    speed = tokens / sum(seconds[WARM_UP:])
    emit(
        "training",
        fits=True,
        **common,
        pair_tokens_per_second=speed,
        peak_bytes=found["peak_bytes"],
        seconds=seconds[WARM_UP:],
        warm_up_seconds=seconds[:WARM_UP],
        losses=found["loss"],
        preparation_seconds=found["preparation"],
    )
    return speed


def main() -> None:
    options, sizes = parse(__doc__)
    if not installed("trl", "datasets", "accelerate"):
        return skip("trl or what it needs (datasets, accelerate) is not installed")
    from score_peers import load_pairs
    from transformers.utils import logging

    logging.disable_progress_bar()
    peers = {}
    for data in DATA:
        told = {"pairs": options.work / data, "model": options.work / "model", "dtype": "bfloat16"}
        told |= {"batch_size": sizes.batch_size, "batch_order": ORDERS[data]}
        peers[data] = argparse.Namespace(**told, learning_rate=LEARNING_RATE, beta=BETA)
    pairs = {data: load_pairs(peer.pairs) for data, peer in peers.items()}
    found: dict[str, dict[int, float]] = {data: {} for data in DATA}
    for micro in sizes.micro_batch_sizes:
        for data, peer in peers.items():
            if not all(micro < size for size, speed in found[data].items() if not speed):
                continue  # a smaller one didn't fit
            if not found[data] or time_for_another():
                found[data][micro] = measure(pairs[data], peer, sizes, micro, {})
                measured()
    for extra in others():
        for data, peer in peers.items():
            if not time_for_another():
                return
            best = max(found[data], key=found[data].__getitem__)
            try:
                measure(pairs[data], peer, sizes, best, extra)
            except Exception as error:  # of packages that are no part of TRL; what was measured without them counts
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                setting = {"micro_batch_size": best} | extra
                emit("training", fits=False, reason=reason, data=data, contender="trl", setting=setting)


if __name__ == "__main__":
    main()
