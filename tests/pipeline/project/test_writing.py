"""`refcache new`: what it writes beside the repository's own files, where it writes, and where it refuses."""

import json
import subprocess

import pytest
from click.testing import CliRunner
from dvc.repo import Repo
from ruamel.yaml import YAML

from pipeline.errors import RequestError
from pipeline.params import load_params
from pipeline.project import writing
from pipeline.project.sources import presets
from pipeline.project.version import check_version, installed_version
from pipeline.project.writing import new_project
from stages.__main__ import OF_DVC, main
from tests import ROOT

SAME = (".dvc/config", ".dvc/.gitignore", ".dvc/plots/cells.json", ".dvcignore")


@pytest.fixture(autouse=True)
def quick_plots_page(monkeypatch):
    """Building the real one takes seconds; tests/integration/test_installed.py has it."""
    monkeypatch.setattr("pipeline.report.vega.vega_bundle", lambda: "")


def files(folder):
    found = (path for path in folder.rglob("*") if path.is_file() and ".git" not in path.relative_to(folder).parts)
    return {path.relative_to(folder).as_posix(): path.read_text() for path in found}


def changed(ours: str, theirs: str) -> list[tuple[str, str]]:
    """Lines that differ, in texts of equally many lines."""
    return [pair for pair in zip(ours.splitlines(), theirs.splitlines(), strict=True) if pair[0] != pair[1]]


def test_a_project_has_the_repositorys_files_apart_from_what_differs_on_purpose(tmp_path):
    written = new_project(tmp_path / "mine", "demo")
    found = files(tmp_path / "mine")
    assert found.keys() == set(written)
    for name in SAME:
        assert found[name] == (ROOT / name).read_text()
    of_version = [line for line in found["dvc.yaml"].splitlines() if line.strip() == "- versions.yaml: [refcache]"]
    rest = found["dvc.yaml"].replace(of_version[0] + "\n", "")
    lines = changed((ROOT / "dvc.yaml").read_text(), rest)
    assert {new for _, new in lines} == {old.replace("python -m stages ", "refcache ") for old, _ in lines}
    assert len(of_version) == len(lines) == len(OF_DVC)
    [(_, heading)] = changed((ROOT / "params.yaml").read_text(), found["params.yaml"])
    assert heading.startswith("#") and "presets/" not in heading
    assert (ROOT / ".gitignore").read_text().startswith(found[".gitignore"])
    assert "offline.html" in found[".gitignore"] and "ruff" not in found[".gitignore"]
    assert "../.." not in found["data/input/README.md"]


@pytest.mark.parametrize("preset", presets())
def test_the_params_of_a_preset_are_its_own_and_valid_and_their_folders_are_there(tmp_path, preset):
    new_project(tmp_path, preset)
    read = YAML(typ="safe", pure=True).load
    kept = ROOT / ("params.yaml" if preset == "demo" else f"presets/{preset}.yaml")
    assert read(tmp_path / "params.yaml") == read(kept)
    params = load_params(tmp_path / "params.yaml", ())
    for folder in (params.prepare.input, params.evaluate.suites_input):
        assert (tmp_path / folder).is_dir()
    assert "presets/" not in (tmp_path / "params.yaml").read_text()


def test_every_preset_but_those_of_studies_is_offered_with_what_it_is_for():
    names = {path.stem for path in (ROOT / "presets").glob("*.yaml")}
    shown = CliRunner().invoke(main, ["new", "--list"]).output.splitlines()
    assert {line.partition(":")[0] for line in shown} == {"demo"} | {name for name in names if "study" not in name}
    assert all(30 < len(line) < 120 for line in shown)


@pytest.mark.parametrize("name, said", [("demmo", "unknown"), ("study-sweeps-qwen2.5-0.5b-one-gpu", "clone")])
def test_an_unknown_preset_is_refused_with_those_there_are(tmp_path, name, said):
    done = CliRunner().invoke(main, ["new", str(tmp_path / "mine"), "--preset", name])
    assert done.exit_code == 2 and said in done.output and "gsm8k-from-scratch" in done.output
    assert not (tmp_path / "mine").exists()


def test_a_folder_that_has_some_of_the_files_is_left_as_it_is(tmp_path):
    (tmp_path / ".dvc").mkdir()
    for name in ("params.yaml", ".dvc/config", "notes.txt"):
        (tmp_path / name).write_text("mine")
    before = files(tmp_path)
    done = CliRunner().invoke(main, ["new", str(tmp_path)])
    assert done.exit_code == 2 and "params.yaml, .dvc/config already" in done.output and "notes" not in done.output
    assert files(tmp_path) == before and not (tmp_path / ".git").exists()


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "mine").write_text("a file")
    with pytest.raises(RequestError, match="is a file"):
        new_project(tmp_path / "mine", "demo")


@pytest.mark.slow
def test_dvc_finds_a_project_of_its_own_in_a_new_folder_and_inside_a_git_repository(tmp_path):
    new_project(tmp_path / "alone", "demo")
    assert (tmp_path / "alone/.git").is_dir()
    subprocess.run(["git", "init", "-q", str(tmp_path / "outer")], check=True)
    inside = tmp_path / "outer/a/b"
    new_project(inside, "demo")
    assert not (inside / ".git").exists()
    for folder, git in ((tmp_path / "alone", tmp_path / "alone"), (inside, tmp_path / "outer")):
        with Repo(str(folder)) as repo:
            assert repo.root_dir == str(folder) and repo.scm.root_dir == str(git)
            commands = {stage.cmd.split()[1] for stage in repo.index.stages if stage.cmd.startswith("refcache ")}
            assert commands == OF_DVC
            watched = [dep for stage in repo.index.stages for dep in stage.deps if dep.def_path == "versions.yaml"]
            assert len(watched) == len(repo.index.stages) and all(dep.params == ["refcache"] for dep in watched)
            assert repo.config["core"]["analytics"] is False


def test_a_folder_that_git_ignores_is_refused(tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / ".gitignore").write_text("/scratch/\n")
    with pytest.raises(RequestError, match="git ignores"):
        new_project(tmp_path / "scratch/mine", "demo")
    assert not (tmp_path / "scratch").exists()


def test_without_git_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RequestError, match="git was not found"):
        new_project(tmp_path / "mine", "demo")
    assert not (tmp_path / "mine").exists()


def test_stages_run_with_the_version_that_the_project_states_and_no_other(tmp_path, monkeypatch):
    new_project(tmp_path, "demo")
    check_version(tmp_path)
    monkeypatch.chdir(tmp_path)
    params = json.dumps({"train": {"variants": {}}})
    (tmp_path / "versions.yaml").write_text("refcache: 0.0.7  # older\n")
    (tmp_path / "params.yaml").write_text(params)
    words = ["suites", "--tokenizer", "absent", "--out", "out"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2 and "0.0.7" in done.output and f"refcache: {installed_version()}" in done.output
    assert "0.0.7" not in CliRunner().invoke(main, ["why-miss", "--help"]).output
    (tmp_path / "versions.yaml").unlink()  # a clone has none
    assert "versions.yaml" not in CliRunner().invoke(main, words).output
    (tmp_path / "versions.yaml").write_text("refcaches: 1\n")
    assert "expected `refcache: " in CliRunner().invoke(main, words).output


def test_every_change_is_of_a_file_that_is_written(tmp_path):
    assert writing.CHANGES.keys() <= set(new_project(tmp_path, "demo"))
