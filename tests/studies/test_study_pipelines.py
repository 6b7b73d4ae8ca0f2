"""The studies' dvc.yaml files, their params, the click options and the modules they run agree."""

import importlib
import shlex
from pathlib import Path

import click
import pytest
import torch
from dvc.repo import Repo
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.params import LastFraction, load_params
from pipeline.trainable.selection import select_trainable
from stages.__main__ import StageGroup
from studies.demo.results import DemoStudy
from studies.pages.settings import load_section
from studies.sweeps.claims import settings
from tests import ROOT
from tests.code_map import modules, reached

STUDIES = ("dynamics", "sweeps", "demo")
DEMO = ROOT / "studies" / "demo"


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    """A copy of the pipelines alone, so that a checkout without .git works too."""
    copy = tmp_path_factory.mktemp("repo")
    for study in STUDIES:
        (copy / "studies" / study).mkdir(parents=True)
        for file in (ROOT / "studies" / study).glob("*.yaml"):
            (copy / "studies" / study / file.name).write_text(file.read_text())
    return Repo.init(str(copy), no_scm=True)


@pytest.fixture(params=STUDIES)
def stages(request, repo):
    return [stage for stage in repo.index.stages if Path(stage.path_in_repo).parts[1] == request.param]


def parsed(stage) -> tuple[str, dict[str, object]]:
    """(module or stage that runs, its options as click understands them)."""
    words = shlex.split(stage.cmd)
    assert words[:2] == ["python", "-m"]
    if words[2] == "stages":
        name, arguments = words[3], words[4:]
        command = StageGroup().get_command(click.Context(click.Group()), name)
    else:
        name, arguments = words[2], words[3:]
        command = importlib.import_module(name).command
    return name, command.make_context(name, arguments).params


def known_paths(stage) -> set[Path]:
    root = Path(stage.repo.root_dir)
    local = [Path(item.fs_path) for item in [*stage.deps, *stage.outs] if item.protocol == "local"]
    return {path.relative_to(root) for path in local if path.is_relative_to(root)}


def test_commands_parse_and_every_path_is_a_dependency_or_an_output(stages):
    for stage in stages:
        for name, value in parsed(stage)[1].items():
            known = known_paths(stage)
            if name == "run":  # a folder, whose files are named one by one
                assert any(path.is_relative_to(value) for path in known), stage.name
            elif isinstance(value, Path) and name != "params_file":
                assert {value, *value.parents} & known, (stage.name, name, value)


def test_commands_read_the_params_that_dvc_watches(stages):
    for stage in stages:
        watched = [Path(dep.fs_path) for dep in stage.deps if hasattr(dep, "params")]
        assert Path(stage.repo.root_dir) / parsed(stage)[1]["params_file"] in watched, stage.name
        assert Path(stage.wdir) == Path(stage.repo.root_dir)  # where the packages are


@pytest.mark.slow
def test_a_stage_runs_again_when_its_code_changes(stages):
    """All rooms that it needs, whole: a list of files would leave out what is imported by way of others."""
    for stage in stages:
        module, options = parsed(stage)
        if module.startswith("studies."):
            needed = {home for name in reached(module) if (home := home_of(name))}
        else:
            needed = {Path("pipeline/objectives")} if module == "train" else set()
            variants = load_params(ROOT / options["params_file"]).train.variants if module == "train" else {}
            needed |= {Path("pipeline/auxdpo") for variant in variants.values() if variant.needs_sketches}
        assert needed <= known_paths(stage), (stage.name, needed - known_paths(stage))


def home_of(module: str) -> Path | None:
    """The folder that a study names for this module; its file where outputs lie there; None for what has no say."""
    top, *inner = module.split(".")
    if top == "cache":
        return Path(top)
    folder = Path(top, *inner[:1])
    if top == "stages" or not inner or not (ROOT / folder).is_dir():
        return None  # reading options, errors, progress
    return modules()[module].relative_to(ROOT) if (ROOT / folder / "dvc.yaml").exists() else folder


def test_outputs_are_in_the_studys_folder_or_among_the_docs(stages):
    for stage in stages:
        study = Path(stage.path_in_repo).parts[1]
        for out in stage.outs:
            path = Path(out.fs_path).relative_to(stage.repo.root_dir)
            assert path.is_relative_to(f"studies/{study}/run") or path.is_relative_to("docs/studies")


def test_dynamics_trains_the_five_objectives():
    params = load_params(ROOT / "studies" / "dynamics" / "params.yaml")
    assert {params.train.variants[name].objective for name in params.sweep.variants} == {
        "dpo",
        "dpop",
        "dpo_nll",
        "bdpo",
        "bpo",
    }


def test_sweep_has_all_48_cells_from_one_scoring_pass(repo):
    names = [stage.name for stage in repo.index.stages if "sweeps" in stage.path_in_repo]
    assert sum(name.startswith("train@") for name in names) == 48
    assert names.count("score") == 1
    params = load_params(ROOT / "studies" / "sweeps" / "params.yaml")
    alphas = [0.1, 0.3, 0.5, 0.7, 1.0]
    assert [(setting.series, setting.value) for setting in settings(params)] == [
        *(("bdpo", mixture) for mixture in (0.1, 0.3, 0.5, 0.7, 0.9, 0.999)),
        *(("bpo_logistic", alpha) for alpha in alphas),
        *(("bpo_hinge", alpha) for alpha in alphas),
    ]
    assert params.sweep.seeds == [0, 1, 2]


def test_demo_study_has_80_cells_from_one_scoring_pass_and_a_sketch_for_each_class(repo):
    stages = [stage for stage in repo.index.stages if "demo" in stage.path_in_repo]
    names = [stage.name for stage in stages]
    classes = load_section(DEMO / "classes.yaml", "demo", DemoStudy).classes
    assert sum(name.startswith("train@") for name in names) == len(classes) * 4 * 5 == 80
    assert names.count("score") == 1 and sum(name.startswith("sketch@") for name in names) == len(classes)
    for number, each in enumerate(classes):
        options = {stage.name: parsed(stage)[1] for stage in stages if f"@class{number}" in stage.name}
        sketch = options[f"sketch@class{number}"]
        trains = [given for name, given in options.items() if name.startswith("train@")]
        assert {given["sketches"] for given in trains} == {sketch["out"]}
        (train_overrides,) = {given["overrides"] for given in trains}
        trained, sketched, meant = (
            load_params(DEMO / "params.yaml", overrides)
            for overrides in (train_overrides, sketch["overrides"], each.overrides)
        )
        assert sketched.sketch == meant.sketch
        assert trained.train == meant.train and meant.train.learning_rate == each.learning_rate
        assert trained.trainable == sketched.trainable == meant.trainable


def test_demo_study_is_the_demo():
    """All settings are the default ones but those that the study is about."""
    own, default = load_params(DEMO / "params.yaml"), load_params(ROOT / "params.yaml")
    about = {"train": {"variants"}, "sketch": {"mode"}, "evaluate": {"prompts", "samples_per_prompt"}}
    for name in ("model", "prepare", "sft", "score", "sketch", "train", "evaluate"):
        left_out = about.get(name, set())
        mine, theirs = (getattr(params, name).model_dump(exclude=left_out) for params in (own, default))
        assert mine == theirs, name
    # AuxDPO's weight is fixed in absolute terms there, at what was the default when the study's figures were made.
    variants = default.train.variants
    variants |= {"auxdpo": variants["auxdpo"].model_copy(update={"null_weight": None, "null_weight_absolute": 1.0})}
    assert {name: own.train.variants[name] for name in variants} == variants
    assert (len(own.sweep.seeds), own.sweep.variants) == (5, ["dpo", "bdpo", "bpo", "auxdpo"])


def test_the_last_quarter_of_the_demos_model_is_its_last_block():
    """As classes.yaml says, which is why no class trains the last quarter."""
    scratch = load_params(DEMO / "params.yaml").model.scratch
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(scratch.architecture, **scratch.config))
    trained = []
    for chosen in (LastFraction(last_fraction=0.25), "last_block"):
        select_trainable(model, chosen)
        trained.append({name for name, parameter in model.named_parameters() if parameter.requires_grad})
    assert trained[0] == trained[1] != set()


@pytest.mark.parametrize("study", ["dynamics", "sweeps"])
def test_presets_train_the_variants_of_their_study(study):
    own, preset = (
        load_params(ROOT / file)
        for file in (f"studies/{study}/params.yaml", f"presets/study-{study}-qwen2.5-0.5b-one-gpu.yaml")
    )
    assert preset.train.variants == own.train.variants
    assert preset.sweep.variants == own.sweep.variants
    assert preset.train.epochs == 3.0
