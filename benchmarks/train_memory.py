"""Peak memory of training against TRL's DPO: proportional resident bytes of the whole process tree, sampled.

    python benchmarks/train_memory.py --ultrafeedback PAIRS.jsonl --out benchmarks/results/DATE-train-memory.md

The model and data of train_throughput.py. Two steps suffice: the second has optimizer states and the largest batch.
"""

import argparse
import tempfile
from pathlib import Path

from train_cases import PEERS, prepare, run_ours, run_peer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ultrafeedback", type=Path, required=True, help="JSON lines with prompt, chosen, rejected")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[8192, 151_936])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--tokens-per-batch", type=int, default=4096)
    parser.add_argument("--micro-batch-sizes", type=int, nargs="+", default=[1, 4], help="of TRL, each measured")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    lines = ["# Peak memory of training", "", "| data | contender | peak GiB | of TRL precomputed, same row group |"]
    lines += ["|---|---|---:|---:|"]
    for dtype in options.dtypes:
        for vocabulary in options.vocabularies:
            with tempfile.TemporaryDirectory(prefix="train-memory-") as scratch:
                case = prepare(
                    Path(scratch) / "case",
                    "ultrafeedback",
                    options.ultrafeedback,
                    count=options.pairs,
                    dtype=dtype,
                    vocabulary=vocabulary,
                    batch_size=options.batch_size,
                    steps=options.steps,
                    tokens_per_batch=options.tokens_per_batch,
                )
                peaks = {}
                for micro in options.micro_batch_sizes:
                    for peer in PEERS:
                        peaks[f"TRL {peer}, micro-batch {micro}"] = run_peer(case, peer, [micro], memory=True)["peak"]
                peaks["refcache, shared prompts"] = run_ours(case, "shared_prompts", memory=True)["peak"]
            least = min(peak for name, peak in peaks.items() if "precompute" in name)
            for name, peak in peaks.items():
                lines.append(f"| {case.title} | {name} | {peak / 2**30:.2f} | {peak / least:.2f} |")
                print(lines[-1], flush=True)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
