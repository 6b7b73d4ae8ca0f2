"""All that only a GPU can show, in one command that ends within --minutes and may be cut off at any time.

    python benchmarks/gpu_suite.py --out benchmarks/results/gpu
    python benchmarks/gpu_suite.py --out /tmp/dry --dry-run            # tiny, on a CPU, numbers mean nothing
    python benchmarks/gpu_suite.py --out /tmp/some --only train kernels

Needs torch, transformers, pyarrow, peft, deepspeed, polars and pydantic; TRL, Liger, pytest and hypothesis where they
are to be measured or run. Writes OUT/results.jsonl (results as they come, also to stdout), OUT/summary.md (anew after
every part) and OUT/suite.log. Exit status: 0, 1 where a part went wrong or there was no time for it, 143 when cut off.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu.running import Part, Record, Suite  # noqa: E402
from benchmarks.gpu.summary import write_summary  # noqa: E402
from pipeline.runs.ports import free_port  # noqa: E402

NEEDED = ("environment", "inputs")  # whatever else is asked for


def parts_of(work: Path, *, dry_run: bool) -> list[Part]:
    """The most valuable first; limits are for a machine that compiles slowly."""

    def part(name: str, module: str, *arguments: str, limit: float, reserve: float, alone: bool = False) -> Part:
        command = ["-m", f"benchmarks.gpu.{module}", "--work", str(work), *arguments]
        return Part(name, command + ["--dry-run"] * dry_run, limit, reserve, one_rank() if alone else {})

    return [
        part("environment", "environment", limit=60, reserve=10),
        part("inputs", "inputs", limit=90, reserve=20),
        part("train/plain", "ours", "--kernels", "plain", limit=90, reserve=30, alone=True),
        part("train/trl", "peer", limit=150, reserve=60),
        part("train/auto", "ours", "--kernels", "auto", limit=150, reserve=60, alone=True),
        part("kernels", "kernels", limit=100, reserve=40),
        part("tests", "marked", limit=150, reserve=30),
        part("sketch", "sketches", limit=70, reserve=35),
        part("auxdpo", "ours", "--auxdpo", limit=100, reserve=45, alone=True),
    ]


def one_rank() -> dict[str, str]:
    """What a launcher would say: without it DeepSpeed looks for MPI. NCCL needs no other interface for one rank."""
    place = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "NCCL_SOCKET_IFNAME": "lo",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return place | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}


def environment_of(work: Path) -> dict[str, str]:
    """Of all parts: no network is asked, and what is compiled once serves the parts that come later."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])])
    caches = {"TORCHINDUCTOR_CACHE_DIR": work / "inductor", "TRITON_CACHE_DIR": work / "triton"}
    caches |= {"REFCACHE_HOME": work / "home", "HF_HOME": work / "huggingface"}
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
    quiet = {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", "WANDB_MODE": "disabled"}
    return {"PYTHONPATH": path} | {name: str(folder) for name, folder in caches.items()} | offline | quiet


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for results.jsonl, summary.md and suite.log")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together")
    parser.add_argument("--only", nargs="+", default=[""], metavar="PART", help="parts whose names begin so")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes; what a CPU can do of it")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="gpu-suite-"))
    parts = parts_of(work, dry_run=options.dry_run)
    unknown = [name for name in options.only if not any(part.name.startswith(name) for part in parts)]
    if unknown:
        parser.error(f"--only: no part begins with {unknown}; there are {[part.name for part in parts]}")
    parts = [part for part in parts if part.name in NEEDED or part.name.startswith(tuple(options.only))]

    def summarise(records: list[Record]) -> None:
        partial = options.out / "summary.md.partial"
        partial.write_text(write_summary(records, dry_run=options.dry_run))
        partial.replace(options.out / "summary.md")

    environment, start = environment_of(work), None
    if options.dry_run:
        from benchmarks.gpu.forking import Fork, import_all

        # Libraries read it when they are imported.
        os.environ.update(environment | {"OMP_NUM_THREADS": "1"})
        sys.path.insert(0, str(ROOT / "benchmarks"))
        import_all()
        start = Fork
    try:
        suite = Suite(options.out, seconds=60 * options.minutes, environment=environment, start=start)
        status = suite.run(parts, summarise)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print((options.out / "summary.md").read_text())
    return status


if __name__ == "__main__":
    raise SystemExit(main())
