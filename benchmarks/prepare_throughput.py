"""Speed and memory of `refcache prepare` against another checkout of it and against TRL's tokenisation of its rows.

    python benchmarks/prepare_throughput.py --rows 24000 240000 --base ../refcache-before --rounds 2 --trl \\
        --pairs UltraFeedback.jsonl --out benchmarks/results/DATE-prepare-throughput.md

Rows: prompt, chosen and rejected of --pairs, in turn and made distinct by a word, or without it random words of
UltraFeedback's lengths. Tokenizer: a byte-level BPE of 16,000 tokens with Qwen2's pattern, trained on 1,000 rows, under
ChatML. Unit: rows a second of the whole command. Memory: resident sets of all its processes together, sampled.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import psutil

ROOT = Path(__file__).parents[1]
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LIMITS = {"max_tokens": 1024, "max_prompt_tokens": 512}
# The peer in a process of its own: seconds of DPOTrainer's construction, less those with ten rows.
TRL = """
import json, sys, time
from datasets import Dataset
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from trl import DPOConfig, DPOTrainer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
config = Qwen2Config(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
                     num_key_value_heads=1, vocab_size=len(tokenizer))
Qwen2ForCausalLM(config).save_pretrained(sys.argv[3] + "/model")
def turns(row):
    return {"prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}]}
rows = [turns(json.loads(line)) for line in open(sys.argv[1])]
def seconds(rows):
    options = DPOConfig(output_dir=sys.argv[3], max_length=1024, dataset_num_proc=2, report_to="none", use_cpu=True)
    data, start = Dataset.from_list(rows), time.perf_counter()
    DPOTrainer(sys.argv[3] + "/model", args=options, train_dataset=data, processing_class=tokenizer)
    return time.perf_counter() - start
few = seconds(rows[:10])
print("SECONDS", seconds(rows) - few)
"""


class Run(NamedTuple):
    seconds: float
    cpu: float
    peak: int  # bytes, all processes together
    largest: int  # bytes, of one process


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="prepare-throughput-") as name:
        scratch = Path(name)
        lines: list[str] = []
        for rows in options.rows:
            file = scratch / f"{rows}" / "pairs.jsonl"
            file.parent.mkdir()
            write_rows(file, rows, options.pairs)
            if not (scratch / "tokenizer").exists():
                train_tokenizer(file, scratch / "tokenizer")
            lines += measured(options, scratch, file, rows)
    report = "\n".join([*heading(options), *lines])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(report + "\n")
    print(report)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[24_000])
    parser.add_argument("--base", type=Path, help="another checkout, measured in turn")
    parser.add_argument("--rounds", type=int, default=2, help="of the smallest number of rows; of others one")
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--trl", action="store_true", help="the peer too, at the smallest number of rows")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def write_rows(file: Path, count: int, pairs: Path | None) -> None:
    draw = random.Random(0)
    source = [json.loads(line) for line in pairs.read_text().splitlines()] if pairs else list(synthetic(1000, draw))
    with file.open("w") as out:
        for number in range(count):
            row = {name: source[number % len(source)][name] for name in ("prompt", "chosen", "rejected")}
            if number >= len(source):
                for name, text in row.items():
                    words = text.split(" ")
                    words.insert(draw.randrange(len(words) + 1), f"{number // len(source)}{draw.choice('abc')}")
                    row[name] = " ".join(words)
            out.write(json.dumps(row) + "\n")


def synthetic(count: int, draw: random.Random) -> Iterator[dict[str, str]]:
    """Random words under Zipf's law; characters as UltraFeedback has them on average: 640, 1,370 and 1,120."""
    words = ["".join(draw.choices("etaoinshrdlucmfwypvbgkjqxz", k=draw.randrange(2, 11))) for _ in range(20_000)]
    weights = [1 / (rank + 2) for rank in range(len(words))]

    def text(mean: int) -> str:
        length = max(3, round(draw.lognormvariate(0, 0.8) * mean / 1.38 / 6))
        return " ".join(draw.choices(words, weights, k=length)).capitalize() + "."

    for _ in range(count):
        yield {"prompt": text(640), "chosen": text(1370), "rejected": text(1120)}


def train_tokenizer(file: Path, folder: Path) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERN), "isolated"), bytes_only])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=16_000,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with file.open() as rows:
        texts = [text for _, line in zip(range(1000), rows, strict=False) for text in json.loads(line).values()]
    backend.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    ).save_pretrained(folder)


def measured(options: argparse.Namespace, scratch: Path, file: Path, rows: int) -> list[str]:
    checkouts = {"this": ROOT} | ({"base": options.base.resolve()} if options.base else {})
    runs: dict[str, list[Run]] = {name: [] for name in checkouts}
    smallest = rows == min(options.rows)
    for _ in range(options.rounds if smallest else 1):
        for name, checkout in checkouts.items():
            runs[name].append(prepare(checkout, scratch, file, scratch / name))
    if "base" in runs:
        for table in ("pairs.parquet", "responses.parquet"):
            ours, theirs = ((scratch / name / "pairs" / table).read_bytes() for name in ("this", "base"))
            assert ours == theirs, f"{table} is not what the base writes"
    lines = [f"\n## {rows:,} rows, {file.stat().st_size / 1e6:,.0f} MB\n"]
    lines += [
        "| | seconds | rows/s | CPU seconds | memory, all processes | largest process |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in runs.items():
        for run in found:
            lines.append(
                f"| {name} | {run.seconds:.1f} | {rows / run.seconds:,.0f} | {run.cpu:.1f} | "
                f"{run.peak / 1e6:,.0f} MB | {run.largest / 1e6:,.0f} MB |"
            )
    if "base" in runs:
        ratios = [theirs.seconds / ours.seconds for ours, theirs in zip(runs["this"], runs["base"], strict=True)]
        lines.append(f"\nTimes the base's speed, run by run: {', '.join(f'{ratio:.2f}' for ratio in ratios)}.")
    if options.trl and smallest:
        seconds = trl_seconds(scratch, file)
        lines.append(
            f"\nTRL's `DPOTrainer` tokenises them in {seconds:.1f} s on two processes ({rows / seconds:,.0f} rows/s)."
        )
    return lines


def prepare(checkout: Path, scratch: Path, file: Path, out: Path) -> Run:
    settings: dict[str, Any] = {
        "model": {"name": str(scratch / "tokenizer"), "scratch": None},
        "sft": {"epochs": 0.0},
        "prepare": {
            "source": "files",
            "input": str(file.parent),
            "files": {"pairs": [file.name]},
            "sft": {"source": "none"},
            "on_bad_row": "skip",
            **LIMITS,
        },
    }
    words = [
        f"--set={section}.{key}={json.dumps(value)}"
        for section, keys in settings.items()
        for key, value in keys.items()
    ]
    paths = {"sft": "sft.parquet", "tokenizer": "tokenizer", "pairs": "pairs", "summary": "summary.json"}
    words += [f"--{name}={out / path}" for name, path in paths.items()]
    command = [sys.executable, "-m", "stages", "prepare", "--params", str(checkout / "params.yaml"), *words]
    start = time.perf_counter()
    process = psutil.Popen(
        command, cwd=checkout, env=os.environ | {"PYTHONPATH": str(checkout)}, stderr=subprocess.DEVNULL
    )
    peak = largest = 0
    cpu: dict[int, float] = {}
    while process.poll() is None:
        sizes = []
        for one in [process, *children(process)]:
            try:
                sizes.append(one.memory_info().rss)
                cpu[one.pid] = sum(one.cpu_times()[:2])
            except psutil.Error:
                continue  # it has just ended
        peak, largest = max(peak, sum(sizes)), max(largest, *sizes, 0)
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return Run(time.perf_counter() - start, sum(cpu.values()), peak, largest)


def children(process: psutil.Popen) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.Error:
        return []


def trl_seconds(scratch: Path, file: Path) -> float:
    words = [sys.executable, "-c", TRL, str(file), str(scratch / "tokenizer"), str(scratch / "trl")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    found = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("SECONDS")]
    if not found:
        raise SystemExit(f"TRL did not finish: {done.stderr[-2000:]}")
    return float(found[0])


def heading(options: argparse.Namespace) -> list[str]:
    versions = {}
    for package in ("transformers", "tokenizers", "pyarrow", "polars", "trl"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    rows = (
        "of UltraFeedback, repeated and made distinct" if options.pairs else "random words of UltraFeedback's lengths"
    )
    return [
        "# Speed and memory of prepare",
        f"\n{time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} cores; {packages}. Rows: {rows}.",
        "`this` and `base` ran in turn and wrote the same bytes." if options.base else "",
    ]


if __name__ == "__main__":
    main()
