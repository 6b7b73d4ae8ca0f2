"""Memory of the scoring stage does not follow the rows: the benchmark's stages, in processes of their own."""

import os

import pytest

from benchmarks.pipeline_scale import measure_size
from tests import ROOT

PAIRS = 91_000  # 200,000 rows
STAGES = ["score", "score, nothing missing", "score, 5 % more"]
LIMIT = 1.1e9  # bytes: 0.75e9 of torch, transformers and one partition; a copy of all rows with texts would be 0.4e9


@pytest.mark.slow
@pytest.mark.skipif("REFCACHE_NIGHTLY" not in os.environ, reason="takes two minutes; set REFCACHE_NIGHTLY=1")
def test_200_000_rows_are_scored_in_1_1_gigabytes(tmp_path):
    found = measure_size(tmp_path / "pairs", ROOT, PAIRS, STAGES)
    assert found["responses"] > 200_000 and found["score"]["rows"] == found["responses"]
    peaks = {name: found[name]["peak_anonymous"] for name in STAGES}
    assert {name: peak for name, peak in peaks.items() if peak > LIMIT} == {}
