"""Part `environment`: the GPU, its driver, versions."""

import importlib.metadata
import platform
import subprocess
from datetime import date

import torch

from benchmarks.gpu.child import emit, parse

PACKAGES = ("torch", "transformers", "triton", "deepspeed", "peft", "pyarrow", "polars", "pydantic", "numpy")
PACKAGES += ("trl", "accelerate", "datasets", "liger-kernel", "flash-attn", "pytest")


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def main() -> None:
    parse(__doc__)
    gpu = "none"
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        gpu = f"{found.name}, {found.total_memory / 2**30:.0f} GiB"
    emit(
        "environment",
        date=date.today().isoformat(),
        gpu=gpu,
        driver=driver() if torch.cuda.is_available() else "none",
        cuda=str(torch.version.cuda),
        python=platform.python_version(),
        packages={package: version(package) for package in PACKAGES},
    )


if __name__ == "__main__":
    main()
