"""Scoring speed against peers in the same run, alternating: `refcache score`, TRL's precompute, a sorted forward.

    python benchmarks/score_throughput.py --ultrafeedback PAIRS.jsonl --gsm8k PAIRS.jsonl \\
        --dtypes float32 bfloat16 --rounds 2 --out benchmarks/results/DATE-score-throughput.md

Model: 27 M-parameter Qwen2 (hidden 512, 8 layers, vocabulary 8,192) from scratch. Unit: pair-tokens per second = tokens
of prompt+chosen and prompt+rejected of all pairs / wall seconds from the command to finished Parquet without start-up
(and with it). Peers get the same token ids; their seconds are those of the forward passes alone.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.data.tables import read_pairs, read_responses  # noqa: E402

PRESET = ROOT / "presets" / "ultrafeedback-from-scratch.yaml"
MODEL = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}


class Case(NamedTuple):
    """One data set under one dtype: prepared pairs and the model, in `folder`."""

    name: str
    dtype: str
    folder: Path
    pair_tokens: int
    distinct: dict[str, int]  # prompts, responses, prompt_tokens, response_tokens

    @property
    def title(self) -> str:
        return f"{self.name}, {self.dtype}"


Results = list[tuple[Case, dict[str, Any]]]


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="score-throughput-") as scratch:
        cases = []
        for name, count in (("ultrafeedback", options.pairs), ("gsm8k", options.problems)):
            for dtype in options.dtypes:
                # Where bf16 has no hardware, peers take minutes for a few pairs.
                wanted = count if dtype == "float32" else max(2, round(count * options.bf16_share))
                lines = first_lines(getattr(options, name), wanted, by_problem=name == "gsm8k")
                cases.append(prepare(Path(scratch) / f"{name}-{dtype}", name, lines, dtype))
        results = [(case, measure(case, options.rounds if case.dtype == "float32" else 1)) for case in cases]
        again = [(case, measure_increments(case)) for case in cases if case.dtype == "float32"]
        peaks = {dtype: matmul_peak(dtype) for dtype in options.dtypes}
    report = "\n".join(write_report(results, again, peaks))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(report + "\n")
    print(report)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ultrafeedback", type=Path, required=True, help="JSON lines with prompt, chosen, rejected")
    parser.add_argument("--gsm8k", type=Path, required=True, help="the same, with `problem`")
    parser.add_argument("--pairs", type=int, default=200, help="of UltraFeedback")
    parser.add_argument("--problems", type=int, default=300, help="of GSM8K, with all their pairs")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--bf16-share", type=float, default=1.0, help="of pairs and problems in bfloat16")
    parser.add_argument("--rounds", type=int, default=2, help="in float32; one in bfloat16")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def first_lines(file: Path, count: int, *, by_problem: bool) -> list[str]:
    lines = file.read_text().splitlines()
    if not by_problem:
        return lines[:count]
    problems = sorted({json.loads(line)["problem"] for line in lines})[:count]
    return [line for line in lines if json.loads(line)["problem"] in set(problems)]


def prepare(folder: Path, name: str, lines: list[str], dtype: str) -> Case:
    (folder / "input").mkdir(parents=True)
    (folder / "input/pairs.jsonl").write_text("\n".join(lines) + "\n")
    params = yaml.safe_load(PRESET.read_text())
    params["model"]["scratch"] |= {"vocabulary_size": 8192, "config": MODEL}
    params["prepare"] |= {"input": str(folder / "input"), "files": {"pairs": ["pairs.jsonl"], "test_pairs": []}}
    params["prepare"] |= {"max_tokens": 1024, "max_prompt_tokens": 512, "long_prompts": "truncate_left"}
    params["prepare"] |= {"test_share": 0.0}
    params["score"] |= {"dtype": dtype}
    params["train"] |= {"dtype": dtype}
    prepare_and_make_model(folder, params)
    return Case(name, dtype, folder, *count_tokens(folder / "pairs"))


def prepare_and_make_model(folder: Path, params: dict[str, Any]) -> None:
    """Writes params.yaml; the model is one step from random: speed does not depend on what the weights say."""
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    stage(folder, "prepare", sft="sft.parquet", tokenizer="tokenizer", pairs="pairs", summary="summary.json")
    params["sft"]["epochs"] = 1.01 * params["sft"]["batch_size"] / pq.read_metadata(folder / "sft.parquet").num_rows
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    stage(folder, "sft", sft="sft.parquet", tokenizer="tokenizer", out="model", history="h.tsv", metrics="m.json")


def count_tokens(pairs: Path) -> tuple[int, dict[str, int]]:
    responses = read_responses(pairs)
    prompts = responses["prompt_ids"].list.len()
    tokens = dict(zip(responses["response_key"], prompts + responses["response_ids"].list.len(), strict=True))
    table = read_pairs(pairs)
    total = sum(tokens[key] for side in ("chosen_key", "rejected_key") for key in table[side])
    distinct = responses.unique("prompt_key")
    counts = {"pairs": len(table), "prompts": len(distinct), "responses": len(responses)}
    counts |= {"prompt_tokens": int(distinct["prompt_ids"].list.len().sum())}
    return total, counts | {"response_tokens": int(responses["response_ids"].list.len().sum())}


def stage(folder: Path, command: str, *, home: str = "home", **paths: str) -> float:
    """Run a stage in `folder`; returns its wall seconds."""
    arguments = [part for name, path in paths.items() for part in (f"--{name}", path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "REFCACHE_HOME": str(folder / home)}
    started = time.perf_counter()
    command_line = [sys.executable, "-m", "stages", command, "--params", "params.yaml", *arguments]
    done = subprocess.run(command_line, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return time.perf_counter() - started


def measure(case: Case, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Contenders in turns, `rounds` times, each from nothing."""
    found: dict[str, list[dict[str, Any]]] = {"refcache": [], "sorted": [], "trl": []}
    for number in range(rounds):
        for name, results in found.items():
            if name == "refcache":
                results.append(score(case, f"{name}{number}"))
            else:
                # The first round finds the best batch size, the others keep it.
                tried = [1, 2, 4, 8] if case.dtype == "float32" else [1, 4]
                sizes = [results[0]["batch_size"]] if results else tried
                results.append(run_peer(case, name, sizes))
            print(case.title, name, {k: v for k, v in results[-1].items() if k != "sums"}, flush=True)
    require_agreement(case, found)
    return found


def score(case: Case, run: str) -> dict[str, Any]:
    shutil.rmtree(case.folder / run, ignore_errors=True)
    (case.folder / run).mkdir()
    paths = {"pairs": "pairs", "model": "model", "out": f"{run}/logps", "metrics": f"{run}/metrics.json"}
    wall = stage(case.folder, "score", home=f"{run}/home", **paths)
    metrics = json.loads((case.folder / run / "metrics.json").read_text())
    kept = ("backend", "rows_scored", "rows_reused", "rows_rescored", "prompt_tokens_shared", "seconds_by_part")
    parts = metrics["seconds_by_part"]
    return {
        "wall": wall,
        # Python's own start and end belong to the start-up; the drift measurement comes after the Parquet is finished.
        "seconds": parts["scoring"] + parts["publication"],
        "with_startup": wall - parts["drift"],
        **{name: metrics[name] for name in kept},
    }


def run_peer(case: Case, method: str, batch_sizes: list[int]) -> dict[str, Any]:
    out = case.folder / f"{method}.json"
    # Passive waiting only matters where something else runs too; it is set for our own training as well.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
    environment |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}
    command = [sys.executable, str(ROOT / "benchmarks/score_peers.py"), method, "--pairs", "pairs", "--model", "model"]
    command += ["--dtype", case.dtype, "--out", str(out), "--batch-sizes", *map(str, batch_sizes)]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=case.folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{method} failed:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(out.read_text())
    return found | {"wall": time.perf_counter() - started}


def require_agreement(case: Case, found: dict[str, list[dict[str, Any]]]) -> None:
    """All three have computed the same thing, or their speeds say nothing."""
    from cache import open_reference

    table = read_pairs(case.folder / "pairs")
    reference = open_reference(case.folder / "refcache0" / "logps", expect=None)
    ours = [reference.sum_logps(table[side].to_list()) for side in ("chosen_key", "rejected_key")]
    for name in ("sorted", "trl"):
        for side, values in enumerate(zip(*found[name][0]["sums"], strict=True)):
            worst = max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(ours[side], values, strict=True))
            if worst > (1e-4 if case.dtype == "float32" else 5e-2):
                raise SystemExit(f"{case.title}: {name} disagrees with refcache by {worst:.2g} (relative)")


def measure_increments(case: Case) -> dict[str, Any]:
    """A second run with nothing new, and one with 5 % of the rows new."""
    import polars as pl

    run = case.folder / "increment"
    responses = pl.read_parquet(case.folder / "pairs" / "responses.parquet").sort("response_key")
    pairs = pl.read_parquet(case.folder / "pairs" / "pairs.parquet")
    late = responses["prompt_key"].unique().sort().gather_every(20).to_list()  # every 20th prompt comes later
    (run / "most").mkdir(parents=True)
    for name, table in (("responses", responses), ("pairs", pairs)):
        table.filter(~pl.col("prompt_key").is_in(late)).write_parquet(run / "most" / f"{name}.parquet")
    paths = {"model": "model", "out": "increment/logps", "metrics": "increment/metrics.json"}

    def go(pairs: str) -> dict[str, Any]:
        wall = stage(case.folder, "score", home="increment/home", pairs=pairs, **paths)
        metrics = json.loads((run / "metrics.json").read_text())
        return {"wall": wall, **{k: metrics[k] for k in ("rows_scored", "seconds_by_part")}}

    return {"most": go("increment/most"), "new": go("pairs"), "nothing": go("pairs")}


def matmul_peak(dtype: str) -> float:
    """FLOP/s of a 2048 x 2048 product, the best of several."""
    import torch

    a = torch.randn(2048, 2048, dtype=getattr(torch, dtype))
    times = []
    for _ in range(8):
        started = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - started)
    return 2 * 2048**3 / min(times)


def useful_flops(case: Case) -> float:
    """Operations of the matrix products that scoring each distinct token once needs; no attention, no whole blocks."""
    hidden, inner, layers = MODEL["hidden_size"], MODEL["intermediate_size"], MODEL["num_hidden_layers"]
    keys = hidden * MODEL["num_key_value_heads"] // MODEL["num_attention_heads"]
    per_token = 2 * layers * (2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner)
    tokens = case.distinct["prompt_tokens"] + case.distinct["response_tokens"]
    return tokens * per_token + case.distinct["response_tokens"] * 2 * hidden * 8192


def write_report(results: Results, again: Results, peaks: dict[str, float]) -> list[str]:
    lines = [
        "# Scoring speed against peers",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores. Pair-tokens per second, ",
    ]
    lines[-1] += "best of the rounds (all rounds in brackets); peers without start-up."
    lines += [
        "",
        "| data | pairs | pair-tokens | contender | pair-tokens/s | with start-up | x TRL | x sorted | of peak |",
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for case, found in results:
        speeds = {name: [case.pair_tokens / run["seconds"] for run in runs] for name, runs in found.items()}
        best = {name: max(values) for name, values in speeds.items()}
        for name, values in speeds.items():
            cells = [case.title, str(case.distinct["pairs"]), f"{case.pair_tokens:,}", label(name, found[name][0])]
            cells += [f"{best[name]:,.0f} ({', '.join(f'{value:,.0f}' for value in values)})"]
            if name == "refcache":
                total = case.pair_tokens / statistics.median(run["with_startup"] for run in found[name])
                used = useful_flops(case) / min(run["seconds"] for run in found[name]) / peaks[case.dtype]
                cells += [
                    f"{total:,.0f}",
                    f"{best[name] / best['trl']:.1f}",
                    f"{best[name] / best['sorted']:.2f}",
                    f"{used:.0%}",
                ]
            else:
                cells += ["", f"{best[name] / best['trl']:.1f}", f"{best[name] / best['sorted']:.2f}", ""]
            lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Matmul peak: {', '.join(f'{dtype} {peak / 1e9:,.0f} GFLOP/s' for dtype, peak in peaks.items())}.",
        "",
    ]
    lines += [
        "| data | rows | distinct prompts | backend | prompt tokens shared | rows scored twice | seconds by part |"
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for case, found in results:
        run = min(found["refcache"], key=lambda run: run["seconds"])
        cells = [case.title, str(run["rows_scored"]), str(case.distinct["prompts"]), run["backend"]]
        cells += [f"{run['prompt_tokens_shared']:,}", str(run["rows_rescored"]), parts(run)]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| data | run | rows scored | wall seconds | seconds by part |", "|---|---|---|---|---|"]
    for case, runs in again:
        for name, title in (("most", "95 % of prompts"), ("new", "5 % new"), ("nothing", "nothing new")):
            run = runs[name]
            lines.append(f"| {case.title} | {title} | {run['rows_scored']} | {run['wall']:.1f} | {parts(run)} |")
    return lines


def label(name: str, run: dict[str, Any]) -> str:
    titles = {"refcache": "refcache score", "sorted": "sorted forward", "trl": "TRL precompute"}
    return titles[name] + (f", batch {run['batch_size']}" if "batch_size" in run else "")


def parts(run: dict[str, Any]) -> str:
    return ", ".join(f"{name} {seconds:.1f}" for name, seconds in run["seconds_by_part"].items())


if __name__ == "__main__":
    main()
