"""The map of the house, and what holds it: which room may import which, and where engines are imported.

Read a row of ARROWS as "modules of this room may import from these rooms"; `room.module` allows that module alone. What
stands in a room, and why, is in docs/architecture.md.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import ROOT
from tests.code_map import PACKAGES, files, imports, module_in, modules, named_in_strings, needs

ARROWS = {
    "params": "",
    "objectives": "",
    "report": "",
    "project": "params report.vega",
    "model": "params",
    "trainable": "params model",
    "forward": "params model",
    "published": "params",
    "sampled": "params model data engine policies reference.identity evaluation.sampling",
    "encoding": "",
    "data": "params model.tokenizer published encoding",
    "tokens": "data",
    "sketches": "params model trainable forward",
    "auxdpo": "params objectives model trainable forward data",
    "engine": "params model forward sketches",
    "browse": "data model.tokenizer policies.identity report",
    "training": "params objectives model trainable forward data tokens auxdpo",
    "cluster": "params model sketches engine",
    "reference": "params model forward data tokens sketches engine cluster",
    "policies": "params model trainable engine",
    "harness": "params model engine policies",
    "evaluation": "params model data tokens engine policies harness reference.identity",
    "export": "data model.tokenizer tokens",
    "runs": "params model trainable forward data tokens training auxdpo.requirements auxdpo.rank_share"
    " reference.identity reference.drift",
    "upkeep": "params model trainable forward data tokens sketches auxdpo engine.rows reference",
}
OPEN = {"children", "errors", "files", "hub", "progress", "workspace"}  # modules of pipeline/ itself, for every room
ENGINES = {"vllm": "pipeline/engine/vllm_engine.py", "deepspeed": "pipeline/training/deepspeed_engine.py"}
RAY = {f"pipeline/cluster/{name}.py" for name in ("actor", "local_cluster", "session")}
ENGINE_FREE = ["params", "objectives", "report", "model", "trainable", "forward", "published", "encoding", "data"]
ENGINE_FREE += ["tokens", "sketches", "auxdpo"]
TORCH_FREE = [
    "cache",
    "pipeline.params",
    "pipeline.project",
    "pipeline.report",
    "pipeline.upkeep.inspection",
    "pipeline.upkeep.garbage",
]


def tops(file: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(file)}


def test_the_map_names_every_room_and_no_file_is_overlooked():
    rooms = {path.name for path in (ROOT / "pipeline").iterdir() if (path / "__init__.py").exists()}
    assert rooms == ARROWS.keys()
    assert {path.stem for path in (ROOT / "pipeline").glob("*.py")} - {"__init__"} <= OPEN
    assert len(files("pipeline")) > 90
    assert len(files("cache")) > 15 and len(files("stages")) > 15 and len(files("studies")) > 30 and files("refcache")


@pytest.mark.parametrize("room", ARROWS)
def test_rooms_import_only_what_the_map_allows(room):
    allowed = ARROWS[room].split()
    for file in files(f"pipeline/{room}"):
        for name in sorted(imports(file) | named_in_strings(file)):
            module = module_in(name)
            if module is None or module.partition(".")[0] == "cache":
                continue
            assert module.startswith("pipeline."), f"{file} imports {name}"
            place = module.removeprefix("pipeline.")
            open_to_all = place in OPEN or place.partition(".")[0] == room
            assert open_to_all or place in allowed or place.partition(".")[0] in allowed, f"{file} imports {name}"


@pytest.mark.parametrize("folder", PACKAGES)
def test_no_module_imports_itself_by_way_of_others(folder):
    """Names in strings count: a module that starts or loads another by its name depends on it as well."""
    graph = {name: needs(name) for name in modules() if name.startswith(folder)}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"circle: {' -> '.join([*way[way.index(name) :], name])}"
        if name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_cache_imports_neither_the_other_rooms_nor_an_engine():
    allowed = {"cache", "pyarrow", "polars", "numpy"} | sys.stdlib_module_names
    for file in files("cache"):
        assert tops(file) <= allowed, file


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_is_imported_in_one_module(engine):
    homes = {file.relative_to(ROOT).as_posix() for file in modules().values() if engine in tops(file)}
    assert homes == {ENGINES[engine]}


@pytest.mark.slow
def test_ray_is_imported_by_what_talks_to_it_and_only_when_it_is_asked_for():
    assert {file.relative_to(ROOT).as_posix() for file in modules().values() if "ray" in tops(file)} == RAY
    loaded = run_python("import sys, pipeline.cluster.remote_engine, pipeline.reference.scoring; print(*sys.modules)")
    assert "ray" not in loaded.split()


@pytest.mark.parametrize("file", files("stages"), ids=lambda file: file.name)
def test_stages_import_no_other_stage(file):
    found = {module_in(name) for name in imports(file)}
    assert {name for name in found if name and name.startswith("stages.")} <= {"stages.options", "stages.tables"}


@pytest.mark.parametrize("folder", [*PACKAGES, "benchmarks", "tests"])
def test_every_module_that_is_named_in_a_string_exists(folder):
    for file in files(folder):
        for name in named_in_strings(file):
            module = module_in(name)
            assert module, f"{file} names {name}"
            attribute = name.removeprefix(module).removeprefix(".").partition(".")[0]
            known = module.count(".") > 0 and re.search(rf"\b{attribute}\b", modules()[module].read_text())
            assert not attribute or known, f"{file} names {name}, but {module} has no {attribute}"


HISTORY = {"docs/log.md", "CHANGELOG.md"}  # say how things were
PATH = re.compile(r"(?<![\w/.-])(?:cache|pipeline|stages|studies|tests|benchmarks|presets)/[\w/-]+\.(?:py|yaml)\b")


def test_every_source_file_that_a_text_or_a_comment_names_exists():
    texts = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*.yaml"), *ROOT.glob("*.toml")]
    texts += [path for name in (*PACKAGES, "tests", "benchmarks", "presets") for path in (ROOT / name).rglob("*.*")]
    texts = [path for path in texts if path.suffix in {".md", ".py", ".yaml", ".toml"} and "results" not in path.parts]
    assert len(texts) > 300
    absent = {
        f"{text.relative_to(ROOT)}: {path}"
        for text in texts
        if text.relative_to(ROOT).as_posix() not in HISTORY
        for path in PATH.findall(text.read_text())
        if not (ROOT / path).exists()
    }
    assert not absent


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_rooms_below_the_engines_load_none():
    """Not by way of other packages either."""
    names = [name for name in modules() if name.split(".")[1:2] and name.split(".")[1] in ENGINE_FREE]
    loaded = set(run_python(f"import sys, {', '.join(names)}; print(*sys.modules)").split())
    assert set(names) <= loaded and not {"vllm", "deepspeed"} & loaded


@pytest.mark.slow
def test_what_commands_read_first_loads_without_torch():
    """Nor pandas, which pyarrow imports, where it is installed, as soon as anything makes an array."""
    names = [name for name in modules() if name in TORCH_FREE or name.rpartition(".")[0] in TORCH_FREE]
    loaded = set(run_python(f"import sys, {', '.join(names)}; print(*sys.modules)").split())
    assert set(names) <= loaded and not {"torch", "transformers", "vllm", "deepspeed", "pandas"} & loaded


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["score", "--help"], ["inspect", "--help"]])
def test_help_answers_within_a_third_of_a_second(arguments):
    def seconds() -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "stages", *arguments], cwd=ROOT, check=True, capture_output=True)
        return time.perf_counter() - started

    # The best of a few: the promise is about our imports, not about what else the machine is doing.
    assert any(seconds() < 0.3 for _ in range(6))
