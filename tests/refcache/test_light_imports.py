"""What a TRL script loads for a cache: no engine, no trainer of ours."""

import subprocess
import sys

import pytest

from tests import ROOT

HEAVY = ("vllm", "deepspeed", "ray", "dvc", "pydantic", "pipeline.training", "pipeline.reference")
SAYS = f"print([name for name in {HEAVY} if name in sys.modules])"


@pytest.mark.slow
@pytest.mark.parametrize(
    "module", ["refcache.lookup", "refcache.unscored", pytest.param("refcache.trl", marks=pytest.mark.slow)]
)
def test_importing_it_loads_no_engine(module):
    if module == "refcache.trl":
        pytest.importorskip("trl", reason="TRL is not installed (pip install -e '.[bench]')")
    code = f"import sys, {module}; {SAYS}"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"
