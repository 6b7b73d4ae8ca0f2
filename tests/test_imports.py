"""Imports go one way: stages -> pipeline -> cache; each engine is imported in few named modules, only when needed."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENGINES = {
    "vllm": {"pipeline/engine/vllm_engine.py", "pipeline/engine/backends.py"},
    "deepspeed": {"pipeline/training/deepspeed_engine.py"},
}
# The mathematics: no engine, not even indirectly.
LEAVES = ["objectives", "params", "forward.logps", "training.batches", "model.trainable", "data.tables"]
LEAVES += ["training.history", "sketches.collector", "auxdpo.nullspace"]


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(file: Path) -> set[str]:
    """Dotted names that `file` imports anywhere, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def tops(file: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(file)}


@pytest.mark.parametrize("file", modules("cache"), ids=lambda file: file.name)
def test_cache_imports_neither_the_other_rooms_nor_an_engine(file):
    allowed = {"cache", "pyarrow", "polars", "numpy"} | sys.stdlib_module_names
    assert tops(file) <= allowed


@pytest.mark.parametrize("file", modules("pipeline"), ids=lambda file: file.name)
def test_pipeline_imports_no_stage_and_engines_only_in_their_module(file):
    found = tops(file)
    assert "stages" not in found
    for engine, homes in ENGINES.items():
        assert engine not in found or file.relative_to(ROOT).as_posix() in homes


@pytest.mark.parametrize("file", modules("stages"), ids=lambda file: file.name)
def test_stages_import_no_other_stage(file):
    shared = {"stages.options", "stages.tables"}
    found = {name for name in imports(file) if name.startswith("stages.")}
    assert all(any(name == s or name.startswith(s + ".") for s in shared) for name in found)


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaves_load_no_engine(leaf):
    loaded = run_python(f"import sys, pipeline.{leaf}; print(*sorted(sys.modules))").split()
    assert not {"vllm", "deepspeed"} & set(loaded)


def test_cache_loads_without_torch():
    loaded = run_python("import sys, cache; print(*sorted(sys.modules))").split()
    assert "cache.reference" in loaded
    assert not {"torch", "transformers", "vllm", "deepspeed", "pydantic"} & set(loaded)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["score", "--help"], ["inspect", "--help"]])
def test_help_answers_within_half_a_second(arguments):
    def seconds() -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "stages", *arguments], cwd=ROOT, check=True, capture_output=True)
        return time.perf_counter() - started

    # The best of a few: the promise is about our imports, not about what else the machine is doing.
    assert min(seconds() for _ in range(4)) < 0.5
