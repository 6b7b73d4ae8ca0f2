"""What a sweep costs: one scoring pass and ten trainings against ten runs of TRL's DPO, everything a user waits for.

    python benchmarks/train_sweep.py --gsm8k PAIRS.jsonl --out benchmarks/results/DATE-train-sweep.md

Ten learning rates, each a process of its own, for us and for TRL with its reference online and precomputed (TRL keeps
precomputed log-probs under the whole training configuration, so that each learning rate computes them anew). Wall
seconds, start-up included; the contenders alternate. From the same seconds comes the number of runs from which on the
reference cache pays.
"""

import argparse
import platform
import statistics
import tempfile
from pathlib import Path

from train_cases import PEERS, Case, prepare, run_ours, run_peer

SMALL = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
OURS = "refcache"
Walls = dict[str, list[float]]  # by contender, of every run


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="train-sweep-") as scratch:
        case = prepare(
            Path(scratch) / "case",
            "gsm8k",
            options.gsm8k,
            count=options.problems,
            dtype="float32",
            vocabulary=8192,
            batch_size=options.batch_size,
            steps=options.steps,
            tokens_per_batch=4096,
            model=SMALL,
        )
        # Found once, and not counted against TRL.
        micro = run_peer(case, "online", options.micro_batch_sizes)["micro_batch_size"]
        walls: Walls = {name: [] for name in (OURS, *PEERS)}
        for number in range(options.runs):
            rate = 1e-6 * 2**number
            losses = {}
            for name, found in walls.items():
                if name == OURS:
                    run = run_ours(case, "auto", learning_rate=rate)
                else:
                    run = run_peer(case, name, [micro], learning_rate=rate)
                found.append(run["wall"])
                losses[name] = run["loss"]
            require_agreement(rate, losses)
            print(f"{rate:.1e}", {name: round(found[-1], 1) for name, found in walls.items()}, flush=True)
        text = report(case, walls, micro) + "\n"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text)
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, required=True, help="JSON lines with prompt, chosen, rejected, problem")
    parser.add_argument("--problems", type=int, default=100, help="with all their pairs")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16, help="pairs of an optimizer step")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--micro-batch-sizes", type=int, nargs="+", default=[1, 4, 16], help="that TRL tries")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def require_agreement(rate: float, losses: dict[str, list[float]]) -> None:
    """The contenders have trained the same thing, or their seconds say nothing."""
    for name, found in losses.items():
        # The first step's loss is log 2 for everybody; later ones drift apart with the learning rate.
        worst = max(abs(a - b) for a, b in zip(found[:5], losses[OURS][:5], strict=True))
        if worst > 1e-3:
            raise SystemExit(f"learning rate {rate:.1e}: losses of {name} and {OURS} differ by {worst:.2g}")


def report(case: Case, walls: Walls, micro: int) -> str:
    runs = len(walls[OURS])
    once = {OURS: case.score_wall} | dict.fromkeys(PEERS, 0.0)
    each = {name: statistics.median(found) for name, found in walls.items()}
    total = {name: once[name] + sum(found) for name, found in walls.items()}
    lines = [
        f"# Cost of a sweep of {runs} against TRL's DPO",
        "",
        f"{platform.machine()}; {case.title}, {case.steps} steps of {case.batch_size} pairs, "
        f"{case.tokens_by_step().sum():,} pair tokens a run; TRL in micro-batches of {micro} pairs. Wall seconds.",
        "",
        f"| contender | once | each run (median) | {runs} runs | of ours | cheaper than ours up to |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for name in walls:
        title = "refcache" if name == OURS else f"TRL, {name}"
        cells = [
            title,
            f"{once[name]:.1f}",
            f"{each[name]:.1f}",
            f"{total[name]:.0f}",
            f"{total[name] / total[OURS]:.2f}",
        ]
        gained = each[name] - each[OURS]
        if name == OURS:
            cells.append("")
        elif gained > 0:
            cells.append(f"{once[OURS] / gained:.1f} runs")
        else:
            cells.append("any number of runs")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
