"""A wheel of this source, installed where nothing else of it is in sight: `refcache new`, `dvc repro`, `doctor`."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests import ROOT
from tests.integration.test_pipeline import TINY, ran

pytestmark = pytest.mark.slow

OF_THE_BUILD = ("cache", "pipeline", "refcache", "stages", "presets", ".dvc/config", ".dvc/.gitignore", ".dvc/plots")
OF_THE_BUILD += (".dvcignore", ".gitignore", "data/input/README.md", "dvc.yaml", "params.yaml", "MANIFEST.in")
OF_THE_BUILD += ("LICENSE", "README.md", "pyproject.toml", "setup.py")


def run(folder: Path, *words: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=folder, env=os.environ | changes, capture_output=True, text=True)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> dict[str, str]:
    """Environment variables under which a fresh venv's commands run: the wheel there, the other packages from ours."""
    root = tmp_path_factory.mktemp("installed")
    for name in OF_THE_BUILD:  # a copy, since building leaves folders behind
        (root / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / "source" / name, ignore=shutil.ignore_patterns("__pycache__", "*.html"))
        else:
            shutil.copy(ROOT / name, root / "source" / name)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    offline = ("--no-deps", "--no-index", "--quiet")
    built = run(root, *pip, "wheel", *offline, "--no-build-isolation", "-w", "wheels", "./source")
    assert built.returncode == 0, built.stdout + built.stderr
    venv.create(root / "venv", symlinks=True)
    python = root / "venv/bin/python"
    [wheel] = (root / "wheels").iterdir()
    done = run(root, *pip, "--python", str(python), "install", *offline, str(wheel))
    assert done.returncode == 0, done.stdout + done.stderr
    [packages] = (root / "venv/lib").glob("python*/site-packages")
    # Its own .pth files stay unread this way, and with them the one of an editable installation.
    (packages / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    scripts = Path(sys.executable).parent
    (root / "venv/bin/dvc").write_text(f"#!{python}\nfrom dvc.cli import main\nraise SystemExit(main())\n")
    (root / "venv/bin/dvc").chmod(0o755)
    search = os.pathsep.join([str(root / "venv/bin"), str(scripts), os.environ["PATH"]])
    return {"PATH": search, "PYTHONPATH": "", "TORCHDYNAMO_DISABLE": "1", "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.fixture(scope="module")
def project(installed, tmp_path_factory) -> Path:
    """What `refcache new` makes, with smaller numbers, and with packages of its own that have our names."""
    root = tmp_path_factory.mktemp("work")
    made = run(root, "refcache", "new", "mine", **installed)
    assert made.returncode == 0, made.stderr
    project = root / "mine"
    params = YAML(typ="safe", pure=True).load(project / "params.yaml")
    params["model"]["scratch"] |= {"vocabulary_size": 300, "config": TINY}
    params["prepare"]["demo"] = {"prompts": 12, "sft_rows": 64}
    params["sft"]["epochs"] = params["train"]["epochs"] = 1.0
    params["sweep"]["variants"] = ["dpo"]
    params["evaluate"] |= {"prompts": 2, "samples_per_prompt": 1, "max_new_tokens": 4}
    (project / "params.yaml").write_text(json.dumps(params))
    for name in ("cache", "pipeline", "stages"):
        (project / name).mkdir()
        (project / name / "__init__.py").write_text("raise SystemExit('a package of the project was imported')")
    return project


def test_the_wheel_is_what_runs(installed, tmp_path):
    code = "import cache, pipeline, refcache, stages; print(cache, pipeline, refcache, stages)"
    done = run(tmp_path, "python", "-P", "-c", code, **installed)
    assert done.stdout.count("/venv/lib/") == 4 and str(ROOT) not in done.stdout, done.stderr
    folders = [Path(place).parent for place in re.findall(r"from '(.*?)'", done.stdout)]
    assert len(folders) == 4 and all((folder / "py.typed").exists() for folder in folders)
    done = run(tmp_path, "refcache", "--help", **installed)
    assert done.returncode == 0 and "doctor" in done.stdout


def test_a_new_project_runs_from_the_wheel_in_one_command_and_then_has_nothing_to_do(installed, project):
    first = run(project, "dvc", "repro", **installed)
    assert first.returncode == 0, first.stdout + first.stderr
    assert ran(first.stdout)[0] == "prepare" and ran(first.stdout)[-1] == "report"
    assert (project / "report/index.html").is_file() and json.loads((project / "results/dpo-0/train.json").read_text())
    again = run(project, "dvc", "repro", **installed)
    assert again.returncode == 0 and ran(again.stdout) == [], again.stderr
    git = run(project, "git", "status", "--short", "--untracked-files=all", **installed)
    made = {line[3:].partition("/")[0] for line in git.stdout.splitlines()} - {"cache", "pipeline", "stages"}
    assert made == {
        ".dvc", ".dvcignore", ".gitignore", "README.md", "data", "dvc.lock", "dvc.yaml", "params.yaml", "results",
        "versions.yaml",
    }  # fmt: skip
    shown = run(project, "dvc", "plots", "show", **installed)
    assert shown.returncode == 0, shown.stderr


def test_another_version_makes_everything_anew(installed, project):
    stated = (project / "versions.yaml").read_text()
    (project / "versions.yaml").write_text("refcache: 99\n")
    try:
        dry = run(project, "dvc", "repro", "--dry", **installed)
        assert {"prepare", "suites", "sft", "score", "train@dpo-0", "report"} <= set(ran(dry.stdout))
        refused = run(project, "dvc", "repro", "prepare", **installed)
        assert refused.returncode and "versions.yaml says refcache 99" in refused.stderr
    finally:
        (project / "versions.yaml").write_text(stated)


def test_doctor_finds_nothing_broken_in_the_project(installed, project):
    done = run(project, "refcache", "doctor", "--json", **installed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not [check for check in json.loads(done.stdout) if check["state"] == "broken"]
