"""How long TRL's DPO takes until its first step: its own precompute against a reference cache.

    python benchmarks/trl_first_step.py --pairs data/ultrafeedback/pairs-train.jsonl --work DIR [--rounds 3]

A model of 6 million parameters from scratch, float32, on what presets/ultrafeedback-from-scratch.yaml says of
the pairs (prepare.after_end: keep). `refcache prepare`, `sft` (two steps) and `score` fill the cache, once; every run
of TRL is a process of its own with empty caches of datasets, in turns. Prints seconds of wall and CPU from the
trainer's construction to its first step, and the precomputed values' largest difference.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml

ROOT = Path(__file__).resolve().parents[1]
PRESET = ROOT / "presets" / "ultrafeedback-from-scratch.yaml"
METHODS = ("precompute", "cache", "cache again")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--one", choices=METHODS, help="one run, by itself")
    options = parser.parse_args()
    options.work, options.pairs = options.work.absolute(), options.pairs.absolute()
    if options.one:
        first_step(options)
        return
    fill_cache(options)
    for number in range(options.rounds):
        for method in METHODS:
            home = options.work / ("home-again" if method == "cache again" else f"home-{method}-{number}")
            environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(home / "hf")}
            environment |= {"REFCACHE_HOME": str(home), "TMPDIR": str(options.work)}
            command = [sys.executable, __file__, "--one", method, "--pairs", options.pairs, "--work", options.work]
            subprocess.run(
                [*map(str, command), "--batch-size", str(options.batch_size)], env=environment, check=True, cwd=ROOT
            )


def fill_cache(options: argparse.Namespace) -> None:
    """The three stages in the work folder, timed."""
    work = options.work
    work.mkdir(parents=True, exist_ok=True)
    params = yaml.safe_load(PRESET.read_text())
    params["prepare"] |= {"input": str(options.pairs.parent), "files": {"pairs": [options.pairs.name]}}
    params["prepare"] |= {"after_end": "keep", "max_prompt_tokens": 1023, "test_share": 0.0}
    params["sft"]["epochs"] = 0.02  # random weights alone are refused
    (work / "params.yaml").write_text(json.dumps(params))
    stages = {
        "prepare": "--sft sft.parquet --tokenizer tokenizer --pairs pairs --summary prepare.json",
        "sft": "--sft sft.parquet --tokenizer tokenizer --out reference --history sft.tsv --metrics sft.json",
        "score": "--pairs pairs --model reference --out logps --metrics score.json",
    }
    for stage, words in stages.items():
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        environment = os.environ | {"PYTHONPATH": str(ROOT), "REFCACHE_HOME": str(work / "home")}
        command = [sys.executable, "-m", "stages", stage, *words.split()]
        subprocess.run(command, cwd=work, env=environment, check=True, stderr=subprocess.DEVNULL)
        spent = cpu(resource.getrusage(resource.RUSAGE_CHILDREN)) - cpu(before)
        print(f"{stage}: {time.perf_counter() - began:.1f} s, {spent:.1f} s of CPU", flush=True)


def first_step(options: argparse.Namespace) -> None:
    """Print seconds until the first step."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from refcache.trl import CachedDPOTrainer

    class Stop(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            raise StopIteration

    work = options.work
    method = "precompute" if options.one == "precompute" else "cache"
    began, before = time.perf_counter(), cpu(resource.getrusage(resource.RUSAGE_SELF))
    data = Dataset.from_list([as_dialogue(row) for row in kept_rows(options.pairs, work)])
    settings = DPOConfig(
        str(work / "out"),
        per_device_train_batch_size=options.batch_size,
        precompute_ref_log_probs=method == "precompute",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        max_length=1024,
    )
    kind, more = (DPOTrainer, {}) if method == "precompute" else (CachedDPOTrainer, {"reference_cache": work / "logps"})
    trainer = kind(
        model=AutoModelForCausalLM.from_pretrained(work / "reference", dtype=torch.float32),
        args=settings,
        train_dataset=data,
        processing_class=PreTrainedTokenizerFast.from_pretrained(work / "tokenizer"),
        callbacks=[Stop()],
        **more,
    )
    with suppress(StopIteration):
        trainer.train()
    spent = cpu(resource.getrusage(resource.RUSAGE_SELF)) - before
    sums = np.array([trainer.train_dataset[name] for name in ("ref_chosen_logps", "ref_rejected_logps")])
    others = work / "precomputed.npy"
    if method == "precompute":
        np.save(others, sums)
    known = method == "cache" and others.exists()
    apart = f", at most {np.abs(sums - np.load(others)).max():.2g} nats apart" if known else ""
    seconds = time.perf_counter() - began
    print(f"{options.one}: {len(data)} pairs, {seconds:.1f} s, {spent:.1f} s of CPU{apart}", flush=True)


def kept_rows(pairs: Path, work: Path) -> list[dict[str, str]]:
    """Those of which prepare made pairs: both responses say something, and not the same."""
    lines = pairs.read_text(encoding="utf-8").splitlines()
    sources = pl.read_parquet(work / "pairs" / "pairs.parquet", columns=["source"])["source"]
    return [json.loads(lines[int(source.rpartition(":")[2]) - 1]) for source in sources]


def as_dialogue(row: dict[str, str]) -> dict[str, Any]:
    answers = {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
    return {"prompt": [{"role": "user", "content": row["prompt"]}]} | answers


def cpu(usage: resource.struct_rusage) -> float:
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
