"""What an engine finds in its environment: settings for a fast start, and the GPUs or cores that are its own."""

import os
from pathlib import Path

from pipeline.children import child_environment
from pipeline.engine.server import CPUS
from pipeline.errors import RequestError
from pipeline.params import ScoreParams


def engine_environment(params: ScoreParams) -> dict[str, str]:
    """The engine's whole environment. What must be set before its Python starts is set, unless the user has set it."""
    defaults = {
        # glibc would return every freed activation to the kernel and fault it in again: 20-30 % of a CPU run in bf16.
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
        # libgomp's threads would spin for milliseconds between two operations: on cores that others use too, a small
        # model ran at a seventh of its speed. This is about 50 us, longer than the gaps of an undisturbed run.
        "GOMP_SPINCOUNT": "1000",
        # The engine's core in that process and not in yet another, whose death vLLM wouldn't notice.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(params.cpu_kv_cache_gib),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    if params.enforce_eager:
        # vLLM would still compile the kernel that ranks tokens, in the first call: 3 to 6 s for ranks nobody asked for.
        defaults["TORCHDYNAMO_DISABLE"] = "1"
    return child_environment(defaults | os.environ)


def engine_places(params: ScoreParams, count: int) -> list[dict[str, str]]:
    """What to add to the environments of `count` engines on this machine, so that each computes on devices of its own.

    On GPUs each gets tensor_parallel_size of the visible ones, in their order; RequestError where there are too few. On
    CPUs each gets as many of the cores that this process may use, close to each other; engines beyond the number of
    cores share them. One engine gets everything.
    """
    if count == 1:
        return [{}]
    if gpus := _visible_gpus():
        each = params.tensor_parallel_size
        if count * each > len(gpus):
            raise RequestError(
                f"score.engines is {count} and score.tensor_parallel_size {each}, which takes {count * each} GPUs, but "
                f"{len(gpus)} are visible ({', '.join(gpus)}). Lower one of the two, or show more in "
                "CUDA_VISIBLE_DEVICES."
            )
        return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[n * each : (n + 1) * each])} for n in range(count)]
    shares = divide_cores(sorted(os.sched_getaffinity(0), key=_neighbourhood), count)
    return [{CPUS: ",".join(map(str, share))} for share in shares]


def divide_cores(cores: list[int], count: int) -> list[list[int]]:
    """Runs of `cores` of one length for `count` engines, which share them where there are fewer.

    What does not divide evenly stays idle: the number of threads decides how a product is summed (docs/numerics.md),
    and a row must get the same numbers whichever engine is free.
    """
    runs = min(count, len(cores))
    each = len(cores) // runs
    return [cores[n % runs * each :][:each] for n in range(count)]


def _neighbourhood(cpu: int) -> tuple[int, int, int]:
    """Sorts the threads of one core next to each other, and the cores of one socket."""
    topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    try:
        package, core = (int((topology / name).read_text()) for name in ("physical_package_id", "core_id"))
    except (OSError, ValueError):  # not on every kernel
        return 0, cpu, cpu
    return package, core, cpu


def _visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them, those alone that CUDA takes; empty without CUDA."""
    import torch

    found = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in named.split(",") if name.strip()] or [str(number) for number in range(found)]
    return names[:found]
