"""Nothing computed is lost: SIGKILL of the score stage and of its engine, over and over, at all sorts of moments.

30 kills hit stages whose engine process is real but holds a stand-in for vLLM (tests/stand_in): 18 of the stage, 12 of
the engine. Those with vLLM itself are in reference/test_scoring.py (2 of the stage, 2 of the engine, and a hang), those
of dvc and of stages under it in test_kills_under_dvc.py. All are SIGKILL to the real process. The moments are drawn
from a fixed seed; where a moment is a time, what it hits depends on the machine.
"""

import random
import signal
from collections import Counter

import numpy as np
import pytest

from cache import CacheIncomplete, open_reference, response_key
from tests.integration import kills
from tests.scoring_project import ScoringProject

pytestmark = pytest.mark.slow

ROWS = 240


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


def test_thirty_kills_of_stages_and_engines_lose_no_journalled_row_and_end_in_the_same_bytes(
    tmp_path, model, score_nursery
):
    undisturbed = ScoringProject(tmp_path / "undisturbed", model, many_rows())
    assert score_nursery.score(undisturbed, wish={}, rows_per_call=2)[0] == 0
    place = ScoringProject(tmp_path / "killed", model, many_rows())
    asked, needed = tmp_path / "asked", {response_key(*row) for row in place.rows}
    # Stopped in a late call, so that a kill at a random time finds a living stage however fast the machine is.
    wish = {"asked": str(asked), "hold": [9, str(tmp_path / "held")]}
    killed = Counter()

    def run(expected, **what):
        before = kills.journalled(place.home)
        asked.unlink(missing_ok=True)
        status, output = score_nursery.score(place, rows_per_call=2, **what)
        assert status == expected, (what, output)
        engines = output.count("was killed by signal 9")
        killed.update(stage=status == -signal.SIGKILL, engine=engines)
        reached, after = set(kills.asked(asked)), kills.journalled(place.home)
        assert not reached & before.keys()
        assert before <= after
        # What was in a call at a death, what waits for the journal and what is on the way into it; nothing more.
        assert len(reached - after.keys()) <= 2 * (3 + engines)

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
