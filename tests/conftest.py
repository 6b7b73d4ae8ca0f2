"""What tests of several folders share."""

import pytest


@pytest.fixture(scope="module")
def server():
    """An S3 server that lives as long as the tests of a file."""
    from tests.object_storage import storage  # half a second, which other tests need not wait for

    with storage() as running:
        yield running
