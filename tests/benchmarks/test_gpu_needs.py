"""Training, sketching and the GPU suite start where few packages are installed."""

import subprocess
import sys

import pytest

from tests import ROOT

NEEDED = ("torch", "transformers", "pyarrow", "peft", "deepspeed", "polars", "pydantic")
# What the suite's parts import.
MODULES = ("pipeline.training.rank", "pipeline.reference.sketching", "pipeline.runs.policy", "benchmarks.gpu.running")
MODULES += tuple(f"benchmarks.gpu.{name}" for name in ("environment", "inputs", "kernels", "marked", "ours", "peer"))
MODULES += ("benchmarks.gpu.sketches", "benchmarks.sketch_cost", "benchmarks.gpu.summary")
# All installed distributions but NEEDED and what they require can't be found.
PROGRAM = """
import importlib, importlib.metadata as metadata, re, sys
from importlib.machinery import PathFinder

def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()

allowed, waiting = set(), [plain(name) for name in sys.argv[1].split(",")]
while waiting:
    name = waiting.pop()
    if name not in allowed:
        allowed.add(name)
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        waiting += [plain(re.match(r"[\\w.-]+", need)[0]) for need in needs if "extra ==" not in need]
owners = metadata.packages_distributions()
absent = {top for top, names in owners.items() if not allowed & set(map(plain, names))}
absent -= {"benchmarks", "cache", "pipeline", "refcache", "stages"}

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in absent else super().find_spec(name, path, target)

sys.meta_path[:] = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
for name in sys.argv[2].split(","):
    importlib.import_module(name)
assert {"datasets", "dvc", "ruamel", "vllm"} <= absent, absent
assert not {"datasets", "dvc", "ruamel", "vllm"} & set(sys.modules)
print("imported")
"""


@pytest.mark.slow
def test_what_the_gpu_suite_imports_is_among_the_packages_it_names():
    command = [sys.executable, "-c", PROGRAM, ",".join(NEEDED), ",".join(MODULES)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "imported" in done.stdout, done.stderr
