"""What both training benchmarks share: prepared data with a reference cache, and a run of ours or of TRL's on it."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from score_throughput import MODEL, PRESET, first_lines, prepare_and_make_model, stage  # noqa: E402

from pipeline.tokens.examples import open_examples  # noqa: E402
from pipeline.training.batches import batch_indices  # noqa: E402

# The settings of the training ranks (pipeline/runs/launch.py), for peers too.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(16 << 30), "OMP_WAIT_POLICY": "PASSIVE"}
LAYOUTS = ("shared_prompts", "packed", "padded")
PEERS = ("online", "precompute")
LEARNING_RATE = 1e-5


class Case(NamedTuple):
    """One data set, dtype and vocabulary: prepared pairs, model and reference cache in `folder`."""

    name: str
    dtype: str
    vocabulary: int
    folder: Path
    batch_size: int
    steps: int
    tokens_per_batch: int
    batch_order: str
    score_wall: float  # seconds of `refcache score`, start-up included

    @property
    def title(self) -> str:
        return f"{self.name} by {self.batch_order}, {self.dtype}, vocabulary {self.vocabulary:,}"

    def tokens_by_step(self) -> np.ndarray:
        """Pair tokens of every step: prompt + chosen and prompt + rejected, whatever is computed."""
        lengths = open_examples(self.folder / "pairs", "train").lengths
        return np.array([lengths[batch].sum() for batch in self.batches()])

    def batches(self) -> list[np.ndarray]:
        pairs = open_examples(self.folder / "pairs", "train")
        groups = pairs.groups if self.batch_order == "prompts" else None
        return [
            batch_indices(step, seed=0, n_examples=len(pairs), batch_size=self.batch_size, groups=groups)
            for step in range(self.steps)
        ]


def prepare(
    folder: Path,
    name: str,
    data: Path,
    *,
    count: int,
    dtype: str,
    vocabulary: int,
    batch_size: int,
    steps: int,
    tokens_per_batch: int,
    batch_order: str = "examples",
    model: dict[str, Any] = MODEL,
) -> Case:
    """The model has `vocabulary` embeddings; its tokenizer has the first 8,192 of them at most."""
    (folder / "input").mkdir(parents=True)
    lines = first_lines(data, count, by_problem=name == "gsm8k")
    (folder / "input/pairs.jsonl").write_text("\n".join(lines) + "\n")
    params = yaml.safe_load(PRESET.read_text())
    params["model"]["scratch"] |= {"vocabulary_size": 8192, "config": model | {"vocab_size": vocabulary}}
    params["prepare"] |= {"input": str(folder / "input"), "files": {"pairs": ["pairs.jsonl"], "test_pairs": []}}
    params["prepare"] |= {"max_tokens": 1024, "max_prompt_tokens": 512, "long_prompts": "truncate_left"}
    params["prepare"] |= {"test_share": 0.0}
    params["score"] |= {"dtype": dtype}
    prepare_and_make_model(folder, params)
    if dtype == "bfloat16":
        _round_weights(folder / "model/model.safetensors")
    examples = len(open_examples(folder / "pairs", "train"))
    params["train"] |= {
        "dtype": dtype,
        "batch_size": batch_size,
        "micro_batch_size": min(2, batch_size),
        "tokens_per_batch": tokens_per_batch,
        "batch_order": batch_order,
        "learning_rate": LEARNING_RATE,
        "schedule": "constant",
        "warmup_share": 0.0,
        "epochs": steps * batch_size / examples,
        "drift_tolerance": 5.0,
        "variants": {"dpo": {"objective": "dpo", "beta": 0.1}},
    }
    params["sweep"] |= {"variants": ["dpo"]}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    score_wall = stage(folder, "score", pairs="pairs", model="model", out="logps", metrics="score.json")
    return Case(name, dtype, vocabulary, folder, batch_size, steps, tokens_per_batch, batch_order, score_wall)


def _round_weights(file: Path) -> None:
    """To bf16, as published models are: DeepSpeed's master weights start from rounded ones, those of autocast don't."""
    rounded = {name: weight.bfloat16().float() for name, weight in load_file(file).items()}
    save_file(rounded, file, metadata={"format": "pt"})


def run_ours(case: Case, layout: str, *, learning_rate: float = LEARNING_RATE, memory: bool = False) -> dict[str, Any]:
    run = case.folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    paths = {"pairs": "pairs", "model": "model", "reference": "logps", "out": "run/policy"}
    paths |= {"history": "run/history.tsv", "metrics": "run/train.json", "params": "params.yaml"}
    words = [word for name, path in paths.items() for word in (f"--{name}", path)]
    command = [sys.executable, "-m", "stages", "train", "--variant", "dpo", "--seed", "0", *words]
    command += ["--set", f"train.layout={layout}"]
    command += ["--set", f"train.learning_rate={learning_rate:.6e}"]  # YAML wants the point
    if layout == "padded":  # as it was before the other layouts: micro-batches of pairs
        command += ["--set", "train.tokens_per_batch=null"]
    wall, peak = _watched(command, case.folder, {"REFCACHE_HOME": str(run / "home")}, memory=memory)
    header, *rows = [line.split("\t") for line in (run / "history.tsv").read_text().splitlines()]
    history = [dict(zip(header, map(float, row), strict=True)) for row in rows]
    tokens = case.tokens_by_step()
    return {
        "seconds": [float(n) / row["tokens_per_second"] for n, row in zip(tokens, history, strict=True)],
        "loss": [row["loss"] for row in history],
        "wall": wall,
        "peak": peak,
    }


def run_peer(
    case: Case,
    method: str,
    micro_batch_sizes: list[int],
    *,
    learning_rate: float = LEARNING_RATE,
    memory: bool = False,
) -> dict[str, Any]:
    out = case.folder / f"{method}.json"
    command = [sys.executable, str(ROOT / "benchmarks/train_peers.py"), method, "--pairs", "pairs", "--model", "model"]
    command += ["--dtype", case.dtype, "--batch-size", str(case.batch_size), "--steps", str(case.steps)]
    command += ["--batch-order", case.batch_order, "--out", str(out), "--learning-rate", str(learning_rate)]
    command += ["--micro-batch-sizes", *map(str, micro_batch_sizes)]
    wall, peak = _watched(command, case.folder, {"OMP_NUM_THREADS": str(os.cpu_count())}, memory=memory)
    return json.loads(out.read_text()) | {"wall": wall, "peak": peak}


def _watched(command: list[str], folder: Path, settings: dict[str, str], *, memory: bool) -> tuple[float, int]:
    """Run it; wall seconds, and the most bytes that its processes held at once (0 unless `memory`)."""
    environment = os.environ | ALLOCATOR | {"PYTHONPATH": str(ROOT)} | settings
    started = time.perf_counter()
    log = folder / "run.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
        peak = [0]
        watcher = threading.Thread(target=_watch_memory, args=(process, peak), daemon=True)
        if memory:
            watcher.start()
        returncode = process.wait()
    if returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text(errors='replace')[-4000:]}")
    return time.perf_counter() - started, peak[0]


def _watch_memory(process: subprocess.Popen[bytes], peak: list[int]) -> None:
    while process.poll() is None:
        peak[0] = max(peak[0], sum(map(_proportional, _tree(process.pid))))
        time.sleep(0.1)


def _tree(root: int) -> list[int]:
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                parents[int(entry)] = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = [root]
    for pid in found:  # grows
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def _proportional(pid: int) -> int:
    """Resident bytes, what processes share divided among them."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return 0
