"""Drift statistics and the sample they are taken from."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from cache import Journal, ReferenceIdentity, logps_table, open_reference, prompt_key, publish_reference, response_key
from pipeline.reference import drift, order
from pipeline.reference.drift_statistics import drift_statistics
from tests.scoring_project import open_responses, write_prepared

IDENTITY = ReferenceIdentity(
    weights="ab", config="cd", adapter=None, dtype="float32", quantization=None, engine="vllm", engine_version="0.32.0"
)


def responses(count):
    """Responses of 1, 2, ... tokens to one prompt of one token."""
    answers = [list(range(1, n + 2)) for n in range(count)]
    return pl.DataFrame(
        {
            "response_key": [response_key([0], answer) for answer in answers],
            "prompt_key": [prompt_key([0])] * count,
            "prompt_ids": [[0]] * count,
            "response_ids": answers,
        }
    )


def test_statistics_against_hand_values():
    cached = [np.array([-1.0, -2.0], np.float32), np.array([-4.0], np.float32)]
    own = [np.array([-1.5, -1.75], np.float32), np.array([-5.0], np.float32)]
    found = drift_statistics(cached, own)
    # Per token: 0.5, 0.25, 1.0. Per sequence: |0.5 - 0.25| and 1.0: errors of opposite sign cancel, as in the sums.
    assert found["responses"] == 2 and found["tokens"] == 3
    assert found["per_token"] == {"max": 1.0, "mean": pytest.approx(1.75 / 3, rel=1e-5), "p99": pytest.approx(0.99)}
    assert found["per_sequence"] == {"max": 1.0, "mean": 0.625, "p99": pytest.approx(0.25 + 0.75 * 0.99)}


def test_statistics_refuse_answers_of_other_lengths():
    with pytest.raises(ValueError):
        drift_statistics([np.zeros(2)], [np.zeros(3)])


@pytest.fixture
def sample(tmp_path, monkeypatch):
    """Keys of the sample of so many rows of a table of responses."""
    monkeypatch.setenv("REFCACHE_HOME", str(tmp_path / "home"))

    def call(table, size):
        return drift.choose_sample(prepared(table, tmp_path), size)["response_key"].to_list()

    return call


def prepared(table, root):
    write_prepared(root / "pairs", table.select("prompt_ids", "response_ids").rows())
    return open_responses(root / "pairs", root / "scratch")


@pytest.mark.parametrize("rows_at_once", [7, 100])
def test_sample_is_the_smallest_keys_and_the_longest_row(sample, monkeypatch, rows_at_once):
    monkeypatch.setattr(order, "CHUNK_ROWS", rows_at_once)
    table = responses(50)
    found = sample(table, 8)
    smallest = table["response_key"].sort().to_list()
    longest = table["response_key"][-1]
    assert longest not in smallest[:8]  # otherwise this test shows nothing
    assert found == [*smallest[:7], longest]
    assert sample(table[::-1], 8) == found


def test_sample_of_everything_is_everything_once(sample):
    table = responses(5)
    assert sample(table, 64) == table["response_key"].sort().to_list()


@pytest.fixture
def published(tmp_path):
    """A cache of three responses whose sum is -1, -4 and -10, and pairs of them."""
    table = responses(3)
    logps = [[-1.0], [-2.0, -2.0], [-3.0, -3.0, -4.0]]
    rows = logps_table(
        response_keys=table["response_key"].to_list(),
        prompt_keys=table["prompt_key"].to_list(),
        n_prompt_tokens=[1, 1, 1],
        token_ids=table["response_ids"].to_list(),
        token_logps=logps,
    )
    publish_reference(tmp_path / "logps", rows, IDENTITY)
    a, b, c = table["response_key"]
    pairs = pl.DataFrame({"chosen_key": [a, b, c], "rejected_key": [b, c, a]})
    return tmp_path / "logps", table, pairs, logps


def test_typical_margin_is_the_median_distance_within_pairs(published, monkeypatch):
    folder, _, pairs, _ = published
    monkeypatch.setenv("REFCACHE_HOME", str(folder.parent / "home"))
    # |-1 + 4| = 3, |-4 + 10| = 6, |-10 + 1| = 9
    assert drift.typical_margin(pairs.to_arrow().to_batches(), open_reference(folder, expect=IDENTITY)) == 6.0


@pytest.fixture
def ensure(published, monkeypatch, tmp_path):
    """ensure_drift on the published cache; its second result says for how many rows transformers was asked."""
    folder, table, pairs, logps = published
    monkeypatch.setenv("REFCACHE_HOME", str(tmp_path / "home"))
    logps = [[-1.5], [-2.5, -2.5], [-3.5, -3.5, -4.5]]
    asked = []

    def forward(model, rows, dtype, *, trust_remote_code):
        asked.extend(rows)
        return [np.array(logps[len(response) - 1], np.float32) for _, response in rows]

    monkeypatch.setattr(drift, "transformers_logps", forward)

    def call(**changes):
        options = {"trainer_dtype": "float32", "sample_size": 2, "pairs": pairs} | changes
        options["pairs"] = options["pairs"].to_arrow().to_batches()
        asked.clear()
        content = drift.ensure_drift(
            folder,
            Path("model"),
            responses=prepared(table, tmp_path),
            reference=open_reference(folder, expect=IDENTITY),
            trust_remote_code=False,
            **options,
        )
        assert json.loads((folder / "drift.json").read_text()) == content
        return content, len(asked)

    return call


def test_drift_is_measured_once_for_the_same_question(ensure, published):
    first, asked = ensure()
    assert asked and first["per_token"]["max"] == 0.5 and first["trainer_dtype"] == "float32"
    before = (published[0] / "drift.json").stat()
    again, asked = ensure()
    assert not asked and again == first
    assert (published[0] / "drift.json").stat().st_ino == before.st_ino  # not even rewritten


def test_drift_is_measured_again_for_another_trainer_dtype_and_for_what_is_new_in_the_sample(ensure):
    assert ensure()[1] == 2
    assert ensure(trainer_dtype="bfloat16")[1] == 2
    assert ensure(trainer_dtype="bfloat16", sample_size=3)[1] == 1


def test_values_of_rows_forwarded_earlier_are_those_of_their_own_row(ensure):
    ensure(sample_size=1)
    content, asked = ensure(sample_size=3)
    assert asked == 2 and content["per_token"] == {"max": 0.5, "mean": 0.5, "p99": 0.5}


def test_new_pairs_move_the_margin_without_a_forward(ensure, published):
    _, _, pairs, _ = published
    assert ensure()[0]["typical_margin"] == 6.0
    content, asked = ensure(pairs=pairs[:1])
    assert content["typical_margin"] == 3.0 and not asked


def test_drift_file_is_replaced_and_never_edited_in_place(ensure, published, tmp_path):
    ensure()
    linked = tmp_path / "dvc-object"
    linked.hardlink_to(published[0] / "drift.json")
    before = linked.read_bytes()
    ensure(trainer_dtype="bfloat16")
    assert linked.read_bytes() == before


def test_a_run_beside_it_does_not_keep_drift_from_being_measured(ensure, tmp_path):
    first, _ = ensure()
    (folder,) = (tmp_path / "home" / "trainer-forward").iterdir()
    with Journal(folder):
        content, asked = ensure(sample_size=3)
    assert asked == 3 and content["responses"] == 3 and first["responses"] == 2
