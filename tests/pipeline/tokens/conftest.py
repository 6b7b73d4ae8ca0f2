import pytest

from pipeline.tokens import examples, layout, supervised


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Batches far smaller than the tables, and a workspace of the test's own."""
    for module in (examples, layout, supervised):
        monkeypatch.setattr(module, "BATCH_ROWS", 7)
    monkeypatch.setenv("REFCACHE_HOME", str(tmp_path / "home"))
