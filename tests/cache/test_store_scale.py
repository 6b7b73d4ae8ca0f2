"""Memory does not follow rows: the benchmark's operations, each in its own process, at two sizes."""

import pytest

from benchmarks.store_scale import measure_size

SMALL, LARGE = 60_000, 480_000  # rows; both spill, and both have partitions of 30,000
OPERATIONS = ["write (journal append)", "publish", "coverage check", "join for training", "view build"]
LOADER = "shuffled batches, warm"
ALLOWED = 60e6  # bytes; the 420,000 further rows are 133e6 uncompressed


@pytest.mark.slow
def test_eight_times_the_rows_take_no_more_memory_and_the_view_feeds_200_000_tokens_a_second(tmp_path):
    small = measure_size(tmp_path / "small", SMALL, [*OPERATIONS, LOADER])
    large = measure_size(tmp_path / "large", LARGE, OPERATIONS)
    grown = {name: large[name]["peak_anonymous"] - small[name]["peak_anonymous"] for name in OPERATIONS}
    assert {name: size for name, size in grown.items() if size > ALLOWED} == {}
    assert small[LOADER]["tokens_per_second"] > 200_000
