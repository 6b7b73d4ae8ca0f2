"""What the tests share: processes to fork ranks and score stages from, a model, and one finished phase 1."""

import pytest

from tests.browser import start_browser
from tests.integration import kills
from tests.integration.trainings import Nursery
from tests.tiny import write_model, write_pairs, write_reference_cache


@pytest.fixture(scope="session")
def nursery():
    with Nursery() as nursery:
        yield nursery


@pytest.fixture(scope="module")
def score_nursery():
    with kills.Nursery() as nursery:
        yield nursery


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def phase_one(tmp_path_factory):
    """Model, pairs (36 to train, 12 held out) and their reference cache."""
    root = tmp_path_factory.mktemp("phase-one")
    model, pairs = write_model(root / "model"), write_pairs(root / "pairs", 24)
    write_reference_cache(root / "logps", pairs, model)
    return root


@pytest.fixture(scope="session")
def one_rank(nursery, phase_one, tmp_path_factory):
    """Nine steps that nobody disturbs, with checkpoints after the third and sixth."""
    return nursery.train(phase_one, tmp_path_factory.mktemp("one-rank"), evaluate_every=4, evaluate_pairs=11)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    running = start_browser(tmp_path_factory.mktemp("profile"))
    yield running
    running.close()
