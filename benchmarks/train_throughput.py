"""Training speed against TRL's DPO in the same run, alternating.

    python benchmarks/train_throughput.py --ultrafeedback PAIRS.jsonl --gsm8k PAIRS.jsonl --rounds 2 \\
        --out benchmarks/results/DATE-train-throughput.md

Model: 27 M-parameter Qwen2 (hidden 512, 8 layers) from scratch, with each of --vocabularies. Unit: pair tokens (prompt
+ chosen and prompt + rejected of every pair, computed or shared) a second over all steps but the first. Everybody gets
the same token ids, global batches, optimizer and allocator settings; TRL takes its fastest micro-batch size.
"""

import argparse
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

from train_cases import LAYOUTS, PEERS, Case, prepare, run_ours, run_peer

Found = dict[str, list[dict[str, Any]]]

# Data and the order of its pairs. Pairs of a prompt in one batch is a choice about training: GSM8K is measured both ways.
CASES = {
    "ultrafeedback": ("ultrafeedback", "examples"),
    "gsm8k": ("gsm8k", "examples"),
    "gsm8k-by-prompts": ("gsm8k", "prompts"),
}


def main() -> None:
    options = parse()
    results: list[tuple[Case, Found]] = []
    for name, order in (CASES[case] for case in options.cases):
        for dtype in options.dtypes:
            for vocabulary in options.vocabularies:
                with tempfile.TemporaryDirectory(prefix="train-throughput-") as scratch:
                    case = prepare(
                        Path(scratch) / "case",
                        name,
                        getattr(options, name),
                        count=options.pairs if name == "ultrafeedback" else options.problems,
                        dtype=dtype,
                        vocabulary=vocabulary,
                        batch_size=options.batch_size,
                        steps=options.steps,
                        tokens_per_batch=options.tokens_per_batch,
                        batch_order=order,
                    )
                    results.append((case, measure(case, options)))
                    tokens = case.tokens_by_step()
                    for contender, runs in results[-1][1].items():
                        for run in runs:
                            run["speed"] = speed(tokens, run)
                        print(case.title, contender, [round(run["speed"]) for run in runs], flush=True)
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text("\n".join(report(results, options)) + "\n")
    print(options.out.read_text())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ultrafeedback", type=Path, required=True, help="JSON lines with prompt, chosen, rejected")
    parser.add_argument("--gsm8k", type=Path, required=True, help="the same, with `problem`")
    parser.add_argument("--pairs", type=int, default=200, help="of UltraFeedback")
    parser.add_argument("--problems", type=int, default=300, help="of GSM8K, with all their pairs")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[8192, 151_936])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch-size", type=int, default=16, help="pairs of an optimizer step")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--tokens-per-batch", type=int, default=4096, help="ours, packed and with shared prompts")
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    parser.add_argument("--micro-batch-sizes", type=int, nargs="+", default=[1, 2, 4], help="that TRL tries")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def measure(case: Case, options: argparse.Namespace) -> Found:
    """Contenders in turns, each a process of its own; the first round finds TRL's micro-batch size."""
    found: Found = {name: [] for name in (*options.layouts, *PEERS)}
    for _ in range(options.rounds):
        for name, runs in found.items():
            if name in PEERS:
                known = [run["micro_batch_size"] for peer in PEERS for run in found[peer]]
                runs.append(run_peer(case, name, known[:1] or options.micro_batch_sizes))
            else:
                runs.append(run_ours(case, name))
            print(case.title, name, runs[-1], flush=True)
    require_agreement(case, found)
    return found


def speed(tokens: Any, run: dict[str, Any]) -> float:
    return float(tokens[1:].sum() / sum(run["seconds"][1:]))


def require_agreement(case: Case, found: Found) -> None:
    """All contenders have made the same steps, or their speeds say nothing."""
    expected = found["precompute"][0]["loss"]
    for name, runs in found.items():
        worst = max(abs(a - b) for run in runs for a, b in zip(run["loss"], expected, strict=True))
        if worst > (1e-3 if case.dtype == "float32" else 5e-2):
            raise SystemExit(f"{case.title}: losses of {name} and TRL precompute differ by {worst:.2g}")


def report(results: list[tuple[Case, Found]], options: argparse.Namespace) -> list[str]:
    lines = [
        "# Training speed against TRL's DPO",
        "",
        f"{platform.machine()}, {options.rounds} rounds in turns, batches of {options.batch_size} pairs, "
        f"{options.steps} steps of which the first isn't counted. Pair tokens a second: the best round (all rounds).",
        "",
        "| data | contender | pair tokens/s | x TRL online | x TRL precomputed |",
        "|---|---|---:|---:|---:|",
    ]
    for case, found in results:
        best = {name: max(run["speed"] for run in runs) for name, runs in found.items()}
        for name, runs in found.items():
            title = f"TRL {name}, micro-batch {runs[0]['micro_batch_size']}" if name in PEERS else f"refcache, {name}"
            rounds = ", ".join(f"{run['speed']:,.0f}" for run in runs)
            cells = [case.title, title, f"{best[name]:,.0f} ({rounds})"]
            cells += [f"{best[name] / best[peer]:.2f}" for peer in PEERS]
            lines.append("| " + " | ".join(cells) + " |")
        worst = max(
            abs(a - b)
            for runs in found.values()
            for run in runs
            for a, b in zip(run["loss"], found["precompute"][0]["loss"], strict=True)
        )
        lines.append(f"| {case.title} | largest difference of a step's loss | {worst:.1e} | | |")
    walls = {name: statistics.median(run["wall"] for run in runs) for name, runs in results[-1][1].items()}
    lines += ["", "Wall seconds of a whole run, start-up included (last data set): "]
    lines[-1] += ", ".join(f"{name} {wall:.0f}" for name, wall in walls.items()) + "."
    return lines


if __name__ == "__main__":
    main()
