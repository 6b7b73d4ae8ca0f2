"""studies/dvc.yaml and the commands agree, and the default pipeline knows nothing of it."""

import shlex
from pathlib import Path

import click
import pytest
from ruamel.yaml import YAML

from studies.__main__ import main
from studies.landscapes.survey import LandscapeParams
from studies.pages.settings import load_section
from studies.toy.networks import ToyParams
from tests import ROOT
from tests.code_map import reached
from tests.studies.test_study_pipelines import home_of

FILE = ROOT / "studies" / "params.yaml"


def stages(file: Path) -> dict:
    return YAML(typ="safe").load(file.read_text())["stages"]


def test_every_stage_is_a_command_whose_paths_dvc_knows():
    found = stages(ROOT / "studies" / "dvc.yaml")
    assert set(found) == set(main.commands)
    for name, stage in found.items():
        words = shlex.split(stage["cmd"])
        assert words[:4] == ["python", "-m", "studies", name] and stage["wdir"] == ".."
        options = main.commands[name].make_context(name, words[4:]).params
        assert {str(options[key]) for key in ("page", "figure")} == {path for out in stage["outs"] for path in out}
        assert stage["params"] == [{str(options["file"]): [name]}]
        assert "studies/__main__.py" in stage["deps"]
        own = {"studies/__main__.py", *(str(home) for m in reached(f"studies.{name}.page") if (home := home_of(m)))}
        assert own <= set(stage["deps"]) and all((ROOT / path).exists() for path in stage["deps"])


def test_the_default_pipeline_depends_on_no_study():
    assert "studies" not in (ROOT / "dvc.yaml").read_text()


@pytest.mark.parametrize(("section", "model"), [("landscapes", LandscapeParams), ("toy", ToyParams)])
def test_the_sections_are_valid(section, model):
    assert load_section(FILE, section, model).objectives


def test_a_wrong_section_is_refused(tmp_path):
    file = tmp_path / "params.yaml"
    file.write_text("toy: {seeds: 1, sedes: 2}\n")
    with pytest.raises(click.UsageError, match="sedes"):
        load_section(file, "toy", ToyParams)
    with pytest.raises(click.UsageError, match="no section landscapes; it has toy"):
        load_section(file, "landscapes", LandscapeParams)


def test_every_committed_page_has_its_figure_and_a_line_in_the_index():
    index = (ROOT / "docs" / "studies" / "README.md").read_text()
    for page in (ROOT / "docs" / "studies").glob("*.md"):
        if page.name != "README.md":
            assert f"({page.name})" in index and (page.with_suffix(".svg").name in page.read_text())
