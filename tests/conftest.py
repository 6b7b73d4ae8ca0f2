"""What tests of several folders share."""

from copy import deepcopy
from functools import cache

import pytest

from pipeline.params import file


@pytest.fixture(scope="session", autouse=True)
def yaml_is_parsed_once():
    """Hundreds of tests load params.yaml as it stands, which takes ruamel longer than most of them take otherwise."""
    parsed = cache(file._parsed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file, "_parsed", lambda text: deepcopy(parsed(text)))
        yield


@pytest.fixture(scope="module")
def server():
    """An S3 server that lives as long as the tests of a file."""
    from tests.object_storage import storage  # half a second, which other tests need not wait for

    with storage() as running:
        yield running
