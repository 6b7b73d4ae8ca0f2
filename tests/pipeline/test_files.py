import resource

import pytest

from pipeline.files import write_json, write_text


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "drift.json"
    write_json(path, {"mean": 0.1})
    before, limit = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))  # as a full disk or a quota ends a write half-way
    try:
        with pytest.raises(OSError, match="File too large"):
            write_text(path, "x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_link_into_another_store_keeps_its_content(tmp_path):
    """DVC hard-links outputs to its own store: an edit in place would change what it has under an old digest."""
    output, stored = tmp_path / "out" / "train.json", tmp_path / "stored"
    write_json(output, {"loss": 1})
    stored.hardlink_to(output)
    write_json(output, {"loss": 2})
    assert '"loss": 1' in stored.read_text() and '"loss": 2' in output.read_text()
