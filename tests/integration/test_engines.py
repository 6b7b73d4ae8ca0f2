"""Several engines on one machine: they are killed, the stage too, and the bytes are those of one undisturbed engine.

Processes, pipes and kills are real; a stand-in for vLLM answers (tests/stand_in), but the last test has vLLM.
"""

import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cache import response_key
from tests.engine_nursery import engines
from tests.integration import kills
from tests.integration.test_kills import many_rows
from tests.scoring_project import ScoringProject
from tests.tiny_reference import adversarial_rows

pytestmark = pytest.mark.slow

POISON = 63


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, model, score_nursery):
    place = ScoringProject(tmp_path_factory.mktemp("undisturbed"), model, many_rows())
    assert score_nursery.score(place, wish={}, rows_per_call=2)[0] == 0
    return kills.published(place.out)


def engines_of(stage: int) -> list[int]:
    """Engine processes that live and were started by this stage."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"pipeline.engine.server" in command and str(stage).encode() in command:
            found.append(int(folder.name))
    return found


@pytest.mark.parametrize("count", [2, 3])
def test_kills_of_engines_and_stages_change_no_byte(tmp_path, model, score_nursery, undisturbed, count):
    place = ScoringProject(tmp_path, model, many_rows())
    needed, draw = {response_key(*row) for row in place.rows}, random.Random(count)
    for _ in range(4):
        before = kills.journalled(place.home)
        moments = [(draw.choice(["engine_before_call", "engine_in_call"]), draw.randint(2, 9)) for _ in range(2)]
        moments.append((draw.choice(["stage_before_append", "stage_after_append"]), draw.randint(10, 14)))
        status, output = score_nursery.score(place, moments, wish={}, rows_per_call=2, engines=count)
        assert status == -signal.SIGKILL, output
        assert before <= kills.journalled(place.home) and max(kills.journalled(place.home).values()) == 1
    moments = [("engine_before_call", 2), ("engine_in_call", 5), ("engine_before_call", 9)]
    status, output = score_nursery.score(place, moments, wish={}, rows_per_call=2, engines=count)
    assert status == 0 and output.count("was killed by signal 9") == 3, output
    assert kills.journalled(place.home) == dict.fromkeys(needed, 1)
    assert kills.published(place.out) == undisturbed


def test_no_engine_outlives_a_killed_stage(tmp_path, model, score_nursery):
    place = ScoringProject(tmp_path, model, many_rows())
    moments = [("engine_before_call", 3), ("stage_after_append", 12)]
    assert score_nursery.score(place, moments, wish={}, rows_per_call=2, engines=3)[0] == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while engines_of(score_nursery.pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_poisonous_row_is_set_aside_and_every_other_row_is_scored(tmp_path, model, score_nursery):
    rows = [row for row in many_rows() if row[1][-1] != POISON]
    prompt, response = rows[100]
    bad = (prompt, [*response[:-1], POISON])
    place = ScoringProject(tmp_path, model, [*rows[:100], bad, *rows[101:]])
    status, output = score_nursery.score(place, wish={"poison": POISON}, rows_per_call=8, engines=2)
    assert status == 1 and f"Response {response_key(*bad).hex()}" in output
    assert output.count("was killed by signal 9") == 3
    assert kills.journalled(place.home) == dict.fromkeys({response_key(*row) for row in rows[:100] + rows[101:]}, 1)


def test_an_engine_that_hangs_holds_up_nothing_but_its_call(tmp_path, model, score_nursery):
    """The row ends three engines, the second by a stop; whoever else was in a call with it is answered."""
    place = ScoringProject(tmp_path, model, many_rows())
    bad = response_key(*place.rows[0])
    status, output = score_nursery.score(place, [("engine_at_row", bad.hex())], wish={}, rows_per_call=8, engines=2)
    assert status == 1 and output.count("no sign of life for 1 s") == 1, output
    assert output.count("was killed by signal 9") == 2
    assert kills.journalled(place.home) == dict.fromkeys({response_key(*row) for row in place.rows} - {bad}, 1)


def test_sigterm_ends_a_stage_within_seconds_while_its_engines_hang(tmp_path, model, score_nursery):
    place, held = ScoringProject(tmp_path, model, many_rows()), tmp_path / "held"
    os.mkfifo(held)
    with ThreadPoolExecutor() as threads:
        stage = threads.submit(score_nursery.score, place, wish={"hold": [3, str(held)]}, rows_per_call=8, engines=2)
        held.read_text()  # blocks until an engine is about to stop
        os.kill(score_nursery.pid, signal.SIGTERM)
        assert stage.result(timeout=20)[0] == 128 + signal.SIGTERM
    assert not engines_of(score_nursery.pid)
    assert score_nursery.score(place, wish={}, rows_per_call=8, engines=2)[0] == 0
    assert set(kills.journalled(place.home).values()) == {1}


def test_two_real_engines_one_of_them_killed_give_the_bytes_of_one(tmp_path, model):
    with kills.Nursery(engines()) as nursery:
        one, two = (ScoringProject(tmp_path / name, model, adversarial_rows()) for name in ("one", "two"))
        assert nursery.score(one)[0] == 0
        status, output = nursery.score(two, [("engine_before_call", 3)], engines=2)
        assert status == 0 and output.count("was killed by signal 9") == 1, output
    assert kills.journalled(two.home) == kills.journalled(one.home)
    assert kills.published(two.out) == kills.published(one.out)
