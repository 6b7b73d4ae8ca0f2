"""How memory and time of the stages follow the pairs: made-up ones, as long as UltraFeedback's, and a free engine.

    python benchmarks/pipeline_scale.py --pairs 20000 200000 1000000 --out benchmarks/results/DATE-pipeline-scale.md
    python benchmarks/pipeline_scale.py --pairs 20000 200000 --root ../older-checkout

Each stage is the command that people type, in a process of its own; only vLLM is replaced, inside the real engine
process (benchmarks/constant_engine). The parent samples anonymous memory (what a process itself allocated: pages of
files that it maps belong to the system) and CPU seconds of the stage's own process, and apart from it the sum over its
children, of which the engine is one. --root measures another checkout of this project on the same tables.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.sizes import size_of, table  # noqa: E402
from benchmarks.synthetic_pairs import write_model, write_prepared  # noqa: E402

NEW_SHARE = 0.05
DRIFT_SAMPLE = "200"
SAMPLED_EVERY = 0.01  # seconds
SKETCH = ["sketch.mode=tensorsketch", "sketch.source=engine", "sketch.k=64", "sketch.audit=32"]
MB, TICKS = 1e6, os.sysconf("SC_CLK_TCK")


class Place:
    """The folder of one size, and the checkout whose stages run on it."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder, self.root = folder, root
        self.model, self.pairs, self.home = folder / "model", folder / "pairs", folder / "home"
        self.logps, self.sketches, self.metrics = folder / "logps", folder / "sketches", folder / "metrics.json"
        self.busy = folder / "engine-seconds"

    def stage(self, name: str, *words: str | Path, settings: list[str] | None = None) -> list[str]:
        """The command line of a stage; settings: of params.yaml, for stages that read it."""
        command = [sys.executable, "-m", "stages", name, *map(str, words)]
        if settings is not None:
            command += ["--params", str(self.root / "params.yaml")]
            command += [word for setting in settings for word in ("--set", setting)]
        return command

    def script(self, name: str, *words: str | Path) -> list[str]:
        """The command line of a file beside this one: for a part of a stage that no command does alone."""
        return [sys.executable, str(Path(__file__).with_name(name)), *map(str, words)]

    def environment(self) -> dict[str, str]:
        search = [str(Path(__file__).parent / "constant_engine"), str(self.root)]
        own = {
            "PYTHONPATH": os.pathsep.join(search),
            "REFCACHE_HOME": str(self.home),
            "REFCACHE_ENGINE_BUSY": str(self.busy),
        }
        return os.environ | own


def score(place: Place) -> list[str]:
    words = ["--pairs", place.pairs, "--model", place.model, "--out", place.logps, "--metrics", place.metrics]
    return place.stage("score", *words, settings=["sketch.mode=none"])


def sketch(place: Place) -> list[str]:
    words = ["--pairs", place.pairs, "--model", place.model, "--out", place.sketches, "--metrics", place.metrics]
    return place.stage("sketch", *words, settings=SKETCH)


def why_miss(place: Place) -> list[str]:
    words = ["--pairs", place.pairs, "--model", place.model, "--reference", place.logps]
    return place.stage("why-miss", *words, settings=[])


def verify_drift(place: Place) -> list[str]:
    words = [place.logps, "--drift", "--sample", DRIFT_SAMPLE, "--pairs", place.pairs, "--model", place.model]
    return place.stage("verify", *words, settings=[])


def collect(place: Place) -> list[str]:
    words = ["--pairs", place.pairs, "--reference", place.logps, "--sketches", place.sketches, "--dry-run"]
    return place.stage("gc", *words)


def export(place: Place, to: str) -> list[str]:
    words = ["--pairs", place.pairs, "--reference", place.logps, "--out", place.folder / to]
    return place.stage("export", "--to", to, *words)


def training_data(place: Place, what: str) -> list[str]:
    return place.script("train_data.py", what, place.pairs, place.logps, place.folder / "job.json")


STAGES: dict[str, Callable[[Place], list[str]]] = {
    "score --help": lambda place: place.stage("score", "--help"),
    "score": score,
    "score, nothing missing": score,
    "score, 5 % more": score,  # `measure_size` writes more pairs before it
    "sketch": sketch,
    "why-miss": why_miss,
    "verify": lambda place: place.stage("verify", place.logps),
    f"verify --drift --sample {DRIFT_SAMPLE}": verify_drift,
    "gc --dry-run": collect,
    "inspect": lambda place: place.stage("inspect", place.logps, "--json"),
    "export --to parquet": lambda place: export(place, "parquet"),
    "export --to jsonl": lambda place: export(place, "jsonl"),
    "train: the stage, before its ranks": lambda place: training_data(place, "stage"),
    "train: a rank, before its model": lambda place: training_data(place, "rank"),
}


def measure(place: Place, name: str) -> dict[str, Any]:
    """Run one stage: wall and CPU seconds, peak anonymous bytes, what its metrics say, and the engine's own seconds."""
    for file in (place.metrics, place.busy):
        file.unlink(missing_ok=True)
    started = time.perf_counter()
    own = children = _Usage(0, 0)
    with (place.folder / "output").open("wb") as output:
        process = subprocess.Popen(
            STAGES[name](place), cwd=place.folder, env=place.environment(), stdout=output, stderr=output
        )
        while process.poll() is None:
            time.sleep(SAMPLED_EVERY)
            own = own.with_peak(_usage(process.pid))
            found = [_usage(child) for child in _descendants(process.pid)]
            children = children.with_peak(_Usage(sum(u.anonymous for u in found), sum(u.ticks for u in found)))
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{name} ended with exit code {process.returncode}:\n{(place.folder / 'output').read_text()}")
    figures: dict[str, Any] = {"seconds": seconds, "cpu": own.ticks / TICKS, "peak_anonymous": own.anonymous}
    figures |= {"children_cpu": children.ticks / TICKS, "children_peak_anonymous": children.anonymous}
    figures["engine_seconds"] = float(place.busy.read_text()) if place.busy.exists() else 0.0
    if place.metrics.exists():
        stated = json.loads(place.metrics.read_text())
        figures["rows"] = stated.get("rows_scored", stated.get("rows_sketched"))
        figures |= {name: stated[name] for name in ("seconds_by_part", "seconds") if isinstance(stated.get(name), dict)}
    return figures


class _Usage:
    """anonymous: bytes; ticks: of CPU."""

    def __init__(self, anonymous: int, ticks: int) -> None:
        self.anonymous, self.ticks = anonymous, ticks

    def with_peak(self, now: "_Usage") -> "_Usage":
        return _Usage(max(self.anonymous, now.anonymous), max(self.ticks, now.ticks))


def _usage(process: int) -> _Usage:
    try:
        status = Path(f"/proc/{process}/status").read_text()
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return _Usage(0, 0)
    kib = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:")), 0)
    return _Usage(1024 * kib, int(fields[11]) + int(fields[12]))


def _descendants(process: int) -> list[int]:
    try:
        tasks = [path.read_text() for path in Path(f"/proc/{process}/task").glob("*/children")]
    except (FileNotFoundError, ProcessLookupError):
        return []
    own = _command_line(process)
    # Until it has begun the program that it is to run, a child shares its parent's memory.
    children = [int(child) for line in tasks for child in line.split() if _command_line(int(child)) != own]
    return children + [other for child in children for other in _descendants(child)]


def _command_line(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def measure_size(folder: Path, root: Path, n_pairs: int, stages: list[str]) -> dict[str, Any]:
    """Every stage in turn on `n_pairs` pairs; the folder is removed afterwards."""
    place = Place(folder, root)
    folder.mkdir(parents=True)
    try:
        write_model(place.model)
        rows, tokens = write_prepared(place.pairs, n_pairs)
        found: dict[str, Any] = {"responses": rows, "tokens": tokens}
        for name in stages:
            if name.endswith("more"):
                write_prepared(place.pairs, round(n_pairs * (1 + NEW_SHARE)))
            found[name] = measure(place, name)
            print(f"{n_pairs:,} pairs, {name}: {found[name]}", file=sys.stderr, flush=True)
        found["bytes"] = {part.name: size_of(part) for part in sorted(folder.iterdir()) if size_of(part) > MB}
        return found
    finally:
        shutil.rmtree(folder)


def overhead(results: dict[int, Any]) -> list[str]:
    """What score costs a row outside the engine, at each size and, from the smallest to the largest, a further row."""
    scored = {n: found["score"] for n, found in results.items() if "score" in found}
    lines = [
        f"- {n:,} pairs: {1e6 * f['cpu'] / f['rows']:.1f} µs of CPU a row, "
        f"{1e6 * (f['seconds'] - f['engine_seconds']) / f['rows']:.1f} µs of wall time."
        for n, f in scored.items()
    ]
    if len(scored) > 1:
        small, large = scored[min(scored)], scored[max(scored)]
        more = large["rows"] - small["rows"]
        wall = (large["seconds"] - large["engine_seconds"]) - (small["seconds"] - small["engine_seconds"])
        cpu = 1e6 * (large["cpu"] - small["cpu"]) / more
        lines.append(f"- A further row: {cpu:.1f} µs of CPU, {1e6 * wall / more:.1f} µs of wall time.")
    return lines


def report(results: dict[int, Any], machine: str) -> str:
    largest, shown = results[max(results)], partial(table, results, list(STAGES), "pairs")
    sizes = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in largest["bytes"].items())
    return "\n".join(
        [
            "# Scale of the pipeline\n",
            f"`python benchmarks/pipeline_scale.py --pairs {' '.join(map(str, results))}`, on {machine}.",
            "Pairs as long as UltraFeedback's; every stage in a fresh process, with an engine of constant answers.",
            f"The largest has {largest['responses']:,} responses and {largest['tokens'] / 1e6:,.0f} M tokens.\n",
            "Anonymous memory of the stage's own process:\n",
            shown("peak anonymous MB", lambda f: f"{f['peak_anonymous'] / MB:,.0f}"),
            shown("CPU seconds", lambda f: f"{f['cpu']:.1f}"),
            shown("seconds", lambda f: f"{f['seconds']:.1f}"),
            "Of its children together, the engine among them:\n",
            shown("peak anonymous MB", lambda f: f"{f['children_peak_anonymous'] / MB:,.0f}"),
            "score outside the engine, its start and end included:\n",
            *overhead(results),
            f"\nOn disk at {max(results):,} pairs: {sizes}.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[20_000, 200_000, 1_000_000])
    parser.add_argument("--out", type=Path, help="write the report to this Markdown file, too")
    parser.add_argument("--work", type=Path, default=ROOT / ".refcache" / "pipeline-scale", help="emptied afterwards")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to measure")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--machine", default="2 cores, 24 GB", help="for the report")
    options = parser.parse_args()
    work, root = options.work.absolute(), options.root.absolute()
    results = {n: measure_size(work / str(n), root, n, options.stages) for n in options.pairs}
    text = report(results, options.machine) + "\n"
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)


if __name__ == "__main__":
    main()
