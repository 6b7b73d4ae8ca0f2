"""Nothing computed is lost: SIGKILL of the score stage and of its engine, over and over, at all sorts of moments.

30 kills hit stages whose engine process is real but holds a stand-in for vLLM (tests/stand_in): 18 of the stage, 12 of
the engine. 5 hit a stage and engines with vLLM itself: 2 of the stage, 3 of the engine; a sixth engine is made to hang.
Kills of dvc and of stages under it are in test_kills_under_dvc.py. All are SIGKILL to the real process. The moments are
drawn from a fixed seed; where a moment is a time, what it hits depends on the machine.
"""

import json
import os
import random
import select
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cache import CacheIncomplete, open_reference, response_key
from tests import stand_in
from tests.integration import kills
from tests.pipeline.scoring_project import PARAMS, Project
from tests.pipeline.tiny_reference import adversarial_rows, write_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ROWS = 240


class Nursery:
    """Starts score stages of one project and tells how they ended."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.stage_nursery"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def score(self, place, moments=(), *, wish=None, kill_after=None, **params):
        """Run a stage to its end, its death, or SIGKILL after `kill_after` seconds; returns its status and output."""
        environment = {"REFCACHE_HOME": str(place.home)} | (stand_in.environment(wish) if wish is not None else {})
        output = place.root / "output"
        order = {
            "arguments": [
                *map(str, (place.pairs, place.model, place.out, place.metrics)),
                (PARAMS.model_copy(update=params)).model_dump(),
            ],
            "environment": environment,
            "output": str(output),
            "moments": moments,
        }
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())
        if kill_after is not None:
            assert not select.select([self.process.stdout], [], [], kill_after)[0], output.read_text()
            os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(int(self.process.stdout.readline()))
        return status, output.read_text()


@pytest.fixture(scope="module")
def nursery():
    nursery = Nursery()
    yield nursery
    nursery.process.stdin.close()
    nursery.process.wait()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def many_rows():
    draw = np.random.default_rng(0)
    prompts = [draw.integers(3, 64, draw.integers(1, 20)).astype(np.int32) for _ in range(ROWS // 4)]
    return [(prompt, draw.integers(3, 64, 5 + n).astype(np.int32)) for prompt in prompts for n in range(4)]


def draw_runs(moments):
    """What befalls each run, until almost all rows are journalled."""
    runs = [{"moments": [("stage_in_load", n)]} for n in (1, 2)]
    runs += [{"kill_after": moments.uniform(0, 1.5)} for _ in range(3)]
    for name in ("stage_before_append", "stage_in_append", "stage_after_append"):
        runs += [{"moments": [(name, moments.randint(1, 5))]} for _ in range(2)]
    for _ in range(3):
        # Not two in a row: an engine killed in a call may have answered before, and die in the next one.
        calls = moments.sample(range(1, 11, 2), 4)
        engines = zip(["engine_before_call", "engine_in_call"] * 2, calls, strict=True)
        runs += [{"moments": [*engines, ("stage_after_append", moments.randint(8, 10))]}]
    moments.shuffle(runs)
    return runs


def test_thirty_kills_of_stages_and_engines_lose_no_journalled_row_and_end_in_the_same_bytes(tmp_path, model, nursery):
    undisturbed = Project(tmp_path / "undisturbed", model, many_rows())
    assert nursery.score(undisturbed, wish={}, rows_per_call=2)[0] == 0
    place = Project(tmp_path / "killed", model, many_rows())
    asked, needed = tmp_path / "asked", {response_key(*row) for row in place.rows}
    # Stopped in a late call, so that a kill at a random time finds a living stage however fast the machine is.
    wish = {"asked": str(asked), "hold": [9, str(tmp_path / "held")]}
    killed = Counter()

    def run(expected, **what):
        before = kills.journalled(place.home)
        asked.unlink(missing_ok=True)
        status, output = nursery.score(place, rows_per_call=2, **what)
        assert status == expected, (what, output)
        engines = output.count("was killed by signal 9")
        killed.update(stage=status == -signal.SIGKILL, engine=engines)
        reached, after = set(kills.asked(asked)), kills.journalled(place.home)
        assert not reached & before.keys()
        assert before <= after
        assert len(reached - after.keys()) <= 2 * (1 + engines)  # what was in a call at a death, and nothing more

    for befalls in draw_runs(random.Random(3)):
        run(-signal.SIGKILL, wish=wish if "kill_after" in befalls else {"asked": str(asked)}, **befalls)
        with pytest.raises(CacheIncomplete):  # nothing half-finished is visible
            open_reference(place.out, expect=None)
    left = needed - kills.journalled(place.home).keys()
    assert len(left) > ROWS / 8
    for change in (1, 2, 3, 5):
        run(-signal.SIGKILL, wish={"asked": str(asked)}, moments=[("stage_in_publication", change)])
    run(0, wish={"asked": str(asked)})
    assert killed == {"stage": 18, "engine": 12}
    assert kills.journalled(place.home) == dict.fromkeys(needed, 1)  # once each: none was scored twice
    assert kills.published(place.out) == kills.published(undisturbed.out)


def test_with_vllm_itself_kills_and_a_hang_lose_nothing_and_a_poisonous_row_is_set_aside(tmp_path, model, nursery):
    rows = adversarial_rows()
    undisturbed, place = (Project(tmp_path / name, model, rows) for name in ("undisturbed", "killed"))
    assert nursery.score(undisturbed)[0] == 0
    assert nursery.score(place, kill_after=3)[0] == -signal.SIGKILL  # while it imports vLLM or loads the model
    assert nursery.score(place, [("stage_after_append", 2)])[0] == -signal.SIGKILL
    kept = place.journalled()
    assert 0 < len(kept) < len(rows)

    shortest = min(rows, key=lambda row: (len(row[0]) + len(row[1]), response_key(*row)))
    poison = response_key(*shortest)
    status, output = nursery.score(place, [("engine_hangs_in_call", 2), ("engine_at_row", poison.hex())])
    assert status == 1, output
    assert output.count("killed by signal 9") == 3 and output.count("gave no sign of life for 1 s") == 1
    assert f"Response {poison.hex()} (of no pair) ended three engines" in output
    assert place.journalled() == {response_key(*row) for row in rows} - {poison}
    assert not place.out.exists()

    assert nursery.score(place)[0] == 0
    assert json.loads(place.metrics.read_text())["rows_scored"] == 1
    assert set(kills.journalled(place.home).values()) == {1}
    assert kills.published(place.out) == kills.published(undisturbed.out)
