"""One place for all tests of a module."""

import pytest


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    from tests.refcache.preferences import Place

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFCACHE_HOME", str(tmp_path_factory.mktemp("home")))
        yield Place(tmp_path_factory.mktemp("trl"))
