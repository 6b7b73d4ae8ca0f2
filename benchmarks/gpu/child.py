"""What every part of the GPU suite shares in its own process: sizes, results as JSON lines, clocks and memory."""

import argparse
import gc
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

GIB = 1 << 30


class Sizes(NamedTuple):
    """What is measured: of the real suite, or of the dry run, whose numbers mean nothing."""

    model: dict[str, Any]  # of a Qwen2 config
    pairs: int  # of each data set
    divisor: int  # of their lengths
    batch_size: int  # pairs of an optimizer step
    steps: int  # counted, after those that warm up
    ours: tuple[tuple[int, int | None], ...]  # (tokens_per_batch, logps_chunk_tokens) that are tried, in this order
    micro_batch_sizes: tuple[int, ...]  # of TRL, in this order
    layers: int  # of the model whose kernels are compared
    sketched: str  # a model of benchmarks/sketch_cost.py
    rows: tuple[int, int, int]  # of it: prompt and response tokens, sequences of a forward
    responses: tuple[int, ...]  # with an AuxDPO offset
    k: int  # numbers of a sketch and group


QWEN = {
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
}
REAL = Sizes(
    model=QWEN,
    pairs=256,
    divisor=1,
    batch_size=64,
    steps=3,
    ours=((16_384, 1024), (16_384, None), (32_768, 1024), (8192, 1024), (65_536, 2048)),
    micro_batch_sizes=(8, 16, 4, 32, 2, 64),
    layers=4,
    sketched="0.5 B",
    rows=(200, 256, 16),
    responses=(4000, 20_000, 60_000),
    k=1024,
)
SMALL = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
DRY = Sizes(
    model=QWEN | SMALL | {"num_attention_heads": 2, "num_key_value_heads": 1},
    pairs=16,
    divisor=32,
    batch_size=4,
    steps=1,
    ours=((256, None), (512, 16)),
    micro_batch_sizes=(2, 4),
    layers=1,
    sketched="6 M",
    rows=(6, 4, 2),
    responses=(40, 60),
    k=16,
)


def parse(description: str | None, *arguments: tuple[str, dict[str, Any]]) -> tuple[argparse.Namespace, Sizes]:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder that the part `inputs` filled")
    parser.add_argument("--dry-run", action="store_true")
    for name, settings in arguments:
        parser.add_argument(name, **settings)
    options = parser.parse_args()
    return options, DRY if options.dry_run else REAL


def emit(case: str, **result: Any) -> None:
    """A result, as soon as there is one: a process that is stopped later has lost nothing."""
    print(json.dumps({"case": case} | result), flush=True)


def skip(reason: str) -> None:
    """Say why this part can't be measured here."""
    emit("skipped", reason=reason)


_STARTED = time.monotonic()
_ends = [_STARTED]  # when each measurement ended


def measured() -> None:
    """Say that a measurement has ended, for `time_for_another`."""
    _ends.append(time.monotonic())


def time_for_another() -> bool:
    """Whether the part's time limit leaves as long as the longest measurement took so far, and some more.

    Says so where it doesn't: the results are then of fewer settings, and the part still ends well.
    """
    limit = float(os.environ.get("GPU_SUITE_SECONDS", "inf"))
    longest = max((end - begin for begin, end in itertools.pairwise(_ends[1:])), default=_ends[-1] - _STARTED)
    if _STARTED + limit - time.monotonic() > 1.5 * longest + 5:
        return True
    emit("no time", reason="no time for further settings")
    return False


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def now() -> float:
    """Seconds, when all that the GPU was told is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int | None:
    """Most that tensors held at once since `forget_peak`; None on a CPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def require_out_of_memory(error: RuntimeError) -> None:
    """Raise it again unless it says that the GPU's memory is full, in whichever library's words."""
    words = str(error).lower()
    if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in words and "alloc_failed" not in words:
        raise error


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
