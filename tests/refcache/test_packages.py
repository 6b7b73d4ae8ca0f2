"""Projects with packages named `cache`, `pipeline` or `stages` of their own: harmless, or one clear message."""

import os
import subprocess
import sys

import pytest

from pipeline.children import child_environment
from tests import ROOT

CONSOLE = "from refcache.command import main; main()"  # what the console script runs, which has no working folder


@pytest.fixture
def clashing(tmp_path):
    """A working folder with all three."""
    for name in ("cache", "pipeline", "stages"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise SystemExit('the foreign {name} was imported')")
    return tmp_path


def python(folder, *words, search=()):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, search), str(ROOT)])}
    return subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)


def test_the_console_script_runs_beside_folders_of_these_names(clashing):
    done = python(clashing, "-P", "-c", CONSOLE, "inspect", "--help")
    assert done.returncode == 0 and "Usage: refcache inspect" in done.stdout, done.stderr


@pytest.mark.slow
def test_modules_of_the_working_folder_can_be_imported_and_hide_none_of_ours(clashing):
    (clashing / "my_rewards.py").write_text("")
    (clashing / "click.py").write_text("raise SystemExit('hidden')")
    code = "import sys; sys.argv = ['refcache', '--version']\ntry:\n    from refcache.command import main; main()\n"
    done = python(
        clashing, "-P", "-c", code + "except SystemExit:\n    import my_rewards, cache; print(cache.__file__)"
    )
    assert str(ROOT / "cache") in done.stdout, done.stderr


@pytest.mark.parametrize("name", ["cache", "pipeline"])
def test_python_m_stages_names_the_package_that_it_found_and_how_to_go_on(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    done = python(tmp_path, "-m", "stages", "verify", "--help")
    assert done.returncode == 2 and not done.stdout and "Traceback" not in done.stderr
    assert f"{name}: found {tmp_path / name}, expected {ROOT / name}" in done.stderr
    assert "`refcache verify --help`" in done.stderr


def test_a_package_on_pythonpath_is_named_by_the_console_script(clashing, tmp_path_factory):
    done = python(tmp_path_factory.mktemp("elsewhere"), "-P", "-c", CONSOLE, "--help", search=[clashing])
    assert done.returncode == 2 and f"Take {clashing} out of PYTHONPATH" in done.stderr
    assert all(f"{name}: found {clashing / name}, " in done.stderr for name in ("cache", "pipeline", "stages"))


def test_a_module_and_a_folder_without_init_are_told_from_ours_as_well(tmp_path):
    module = (tmp_path / "cache").with_suffix(".py")
    module.touch()
    (tmp_path / "pipeline").mkdir()  # no package, so that ours is found behind it
    done = python(tmp_path, "-m", "stages", "--help")
    assert done.returncode == 2 and str(module) in done.stderr and "pipeline:" not in done.stderr


def test_a_missing_package_is_an_incomplete_installation(tmp_path):
    (tmp_path / "refcache").mkdir()
    for name in ("__init__", "command", "packages"):
        (tmp_path / f"refcache/{name}.py").write_text((ROOT / f"refcache/{name}.py").read_text())
    done = subprocess.run([sys.executable, "-S", "-c", CONSOLE], cwd=tmp_path, capture_output=True, text=True, env={})
    assert done.returncode == 2 and "cache: found nothing" in done.stderr and "--force-reinstall" in done.stderr


@pytest.mark.parametrize("module", ["pipeline.data.shards", "pipeline.sampled.math_worker"])
def test_a_child_process_imports_ours_in_a_working_folder_that_has_others(clashing, module):
    environment = child_environment({"PATH": os.environ["PATH"]})
    code = f"import importlib.util as u; print(u.find_spec({module!r}).origin)"
    # -m of a module that only tells where it would find the other: the way children are started, without their work.
    done = subprocess.run([sys.executable, "-c", code], cwd=clashing, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(ROOT / f"{module.replace('.', '/')}.py"), done.stderr
