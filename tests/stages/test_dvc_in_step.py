"""dvc.yaml, the click options and the params models agree."""

import shlex
from pathlib import Path

import click
import pytest
from dvc.repo import Repo

from pipeline.params import Params, TrainParams
from stages.__main__ import COMMANDS, StageGroup
from tests import ROOT


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """The expanded stages, read in a copy so that a checkout without .git works too."""
    copy = tmp_path_factory.mktemp("repo")
    for name in ("dvc.yaml", "params.yaml"):
        (copy / name).write_text((ROOT / name).read_text())
    return list(Repo.init(str(copy), no_scm=True).index.stages)


def parsed(stage) -> tuple[str, dict[str, object]]:
    words = shlex.split(stage.cmd)
    assert words[:3] == ["python", "-m", "stages"]
    command = StageGroup().get_command(click.Context(click.Group()), words[3])
    assert command is not None
    return words[3], command.make_context(words[3], words[4:]).params


def test_every_pipeline_command_is_a_stage(stages):
    assert {parsed(stage)[0] for stage in stages} == set(COMMANDS) - {
        "new",
        "browse",
        "export",
        "doctor",
        "inspect",
        "sketch-report",
        "verify",
        "why-miss",
        "gc",
    }


def test_cells_are_named_by_variant_and_seed(stages):
    names = {stage.name for stage in stages}
    assert {"train@dpo-0", "train@bdpo-0"} <= names and "evaluate" in names  # which takes all cells at once


def test_command_lines_carry_only_paths_and_cell_coordinates(stages):
    for stage in stages:
        _, options = parsed(stage)
        given = {word.removeprefix("--").replace("-", "_") for word in shlex.split(stage.cmd) if word.startswith("--")}
        for name in given:
            assert isinstance(options[name], Path) or name in {"variant", "seed"}, (stage.name, name)


def test_every_path_on_a_command_line_is_a_dependency_or_an_output(stages):
    root = Path(stages[0].repo.root_dir)
    for stage in stages:
        local = [Path(item.fs_path) for item in [*stage.deps, *stage.outs] if item.protocol == "local"]
        known = {path.relative_to(root) for path in local if path.is_relative_to(root)}
        for name, value in parsed(stage)[1].items():
            if isinstance(value, Path) and name != "params_file":
                if stage.name.startswith("train@") and name == "sketches":
                    continue  # its constraint stands for them, so that only variants that read them depend on them
                assert {value, *value.parents} & known, (stage.name, name, value)


def test_suites_go_from_stage_to_stage_and_none_of_them_reaches_train(stages):
    options = {stage.name: parsed(stage)[1] for stage in stages}
    prepared, scored = options["suites"]["out"], options["score"]["suites_out"]
    assert prepared and scored and scored != options["score"]["out"]
    assert options["score"]["suites"] == prepared == options["evaluate"]["suites"]
    assert options["evaluate"]["suites_reference"] == scored
    by_name = {stage.name: {dep.def_path for dep in stage.deps} for stage in stages}
    assert {str(prepared), str(scored)} <= by_name["evaluate"] and str(prepared) in by_name["score"]
    for name in ("prepare", "sft", "sketch", "train@dpo-0"):
        assert not {str(prepared), str(scored)} & by_name[name]
    assert all(
        out.persist for stage in stages if stage.name in ("suites", "score") for out in stage.outs if not out.metric
    )


def test_train_watches_every_setting_that_can_change_it(stages):
    """One by one, since depending on the whole section would re-run every variant when one changes."""
    cell = next(stage for stage in stages if stage.name == "train@dpo-0")
    watched = {key for dep in cell.deps if hasattr(dep, "params") for key in dep.params}
    settings = {f"train.{name}" for name in TrainParams.model_fields if name != "variants"}
    assert watched == settings | {"train.variants.dpo", "trainable"}


def test_only_variants_that_read_sketches_are_trained_anew_when_these_change(stages):
    """The stamp that train depends on has their digest, or null; test_constraint.py."""
    for stage in stages:
        paths = [dep.def_path for dep in stage.deps]
        if stage.name.startswith("train@"):
            variant = stage.name.removeprefix("train@").rpartition("-")[0]
            assert f"data/reference/constraints/{variant}.json" in paths
            assert "data/reference/sketches" not in paths
        if stage.name.startswith("constraint@"):  # the stamp also says what the variant's null_weight counts in
            watched = [key for dep in stage.deps if hasattr(dep, "params") for key in dep.params]
            assert watched == [f"train.variants.{stage.name.removeprefix('constraint@')}"]


def test_watched_sections_exist(stages):
    for stage in stages:
        for dep in stage.deps:
            for key in getattr(dep, "params", []):
                assert key.partition(".")[0] in Params.model_fields, (stage.name, key)
