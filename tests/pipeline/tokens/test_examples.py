"""Examples say what the tables and the cache say, in the tables' order, and never more than was asked for."""

import numpy as np
import polars as pl
import pytest

from cache import CacheIncomplete, KeySet, open_reference
from pipeline.data.splitting import held_out_rows
from pipeline.data.tables import PAIRS_SCHEMA, read_pairs, read_responses, write_table
from pipeline.errors import RequestError, RunFailed
from pipeline.tokens import examples as module
from pipeline.tokens.examples import Examples, Places, open_examples, with_reference_sums
from pipeline.workspace import views_folder
from tests.tiny import write_model, write_pairs, write_reference_cache


@pytest.fixture
def pairs(tmp_path):
    """In an order in which neither prompts nor splits stand together."""
    folder = write_pairs(tmp_path / "pairs", 30)
    mixed = read_pairs(folder).sample(fraction=1, shuffle=True, seed=2)
    write_table(mixed.to_arrow().cast(PAIRS_SCHEMA), folder / "pairs.parquet", PAIRS_SCHEMA)
    return folder


def joined(folder, split):
    """pairs with both responses' tokens, by polars."""
    ids = read_responses(folder).select("response_key", "prompt_ids", "response_ids")
    rows = read_pairs(folder, split)
    for side in ("chosen", "rejected"):
        of_side = ids.rename({name: f"{side}_{name}" for name in ("prompt_ids", "response_ids")})
        rows = rows.join(of_side, left_on=f"{side}_key", right_on="response_key", how="left", maintain_order="left")
    return rows


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("most", [None, 3])
def test_examples_are_the_pairs_of_their_split(pairs, split, most):
    table = joined(pairs, split)
    table = table if most is None else table[held_out_rows(len(table), most)]
    found = open_examples(pairs, split, most=most)
    assert len(found) == len(table) > 2
    for number, row in enumerate(table.iter_rows(named=True)):
        for side, name in enumerate(("chosen", "rejected")):
            place = int(found.rows[number, side])
            assert found.tokens.response_ids(place).tolist() == row[f"{name}_response_ids"]
            assert found.tokens.prompt_ids(place).tolist() == row[f"{name}_prompt_ids"]
            assert found.response_lengths[number, side] == len(row[f"{name}_response_ids"])
        sides = ("chosen_prompt_ids", "chosen_response_ids", "rejected_prompt_ids", "rejected_response_ids")
        assert found.lengths[number] == sum(len(row[name]) for name in sides)
    assert found.key_table.equals(table.select("chosen_key", "rejected_key"))
    assert pl.concat(map(pl.DataFrame, found.key_batches())).equals(found.key_table)
    assert found.desirable is None and found.reference_sums is None


def test_prompts_are_numbered_as_their_keys_ascend(pairs):
    """On which the order of batches rests."""
    found, keys = open_examples(pairs, "train"), read_pairs(pairs, "train")["prompt_key"]
    assert np.unique(found.groups, return_inverse=True)[1].tolist() == (keys.rank("dense") - 1).to_list()


def test_reference_sums_are_the_caches_and_one_missing_is_an_error(pairs, tmp_path):
    model = write_model(tmp_path / "model")
    reference = open_reference(write_reference_cache(tmp_path / "logps", pairs, model), expect=None)
    found = with_reference_sums(open_examples(pairs, "test", most=4), reference)
    expected = [reference.sum_logps(found.key_table[side]) for side in ("chosen_key", "rejected_key")]
    assert found.reference_sums.T.tolist() == [side.tolist() for side in expected]
    write_reference_cache(tmp_path / "logps", pairs, model, splits=["train"])
    with pytest.raises(CacheIncomplete, match="lacks"):
        with_reference_sums(open_examples(pairs, "test"), open_reference(tmp_path / "logps", expect=None))


def test_a_cache_published_anew_has_sums_of_its_own(pairs, tmp_path):
    sums = []
    for seed in (0, 1):
        model = write_model(tmp_path / f"model-{seed}", seed=seed)
        reference = open_reference(write_reference_cache(tmp_path / "logps", pairs, model), expect=None)
        found = with_reference_sums(open_examples(pairs, "train"), reference)
        sums.append(found.reference_sums)
        assert found.reference_sums[0, 0] == reference.sum_logps(found.key_table["chosen_key"][:1])[0]
    assert (sums[0] != sums[1]).all()


def test_ranks_open_what_the_stage_made_and_say_when_it_is_gone(pairs, monkeypatch):
    made = open_examples(pairs, "train")
    monkeypatch.setattr(module, "build_once", None)
    again = Examples(Places(*list(made.places)))
    assert np.array_equal(again.rows, made.rows) and not again.rows.flags.writeable
    (views_folder() / made.places.examples / "train-lengths").unlink()
    with pytest.raises(RunFailed, match="Run the same command again"):
        Examples(made.places)


def test_changed_pairs_are_other_examples(pairs):
    before = open_examples(pairs, "train")
    fewer = read_pairs(pairs)[:20]
    write_table(fewer.to_arrow().cast(PAIRS_SCHEMA), pairs / "pairs.parquet", PAIRS_SCHEMA)
    after = open_examples(pairs, "train")
    assert len(after) == len(fewer.filter(pl.col("split") == "train")) < len(before)
    assert len(Examples(before.places)) == len(before)


def test_unpaired_feedback_that_was_not_prepared_is_asked_for(pairs):
    with pytest.raises(RequestError, match=r"prepare\.feedback"):
        open_examples(pairs, "train", feedback=True)


def test_distinct_responses_are_all_there(pairs):
    found = open_examples(pairs, "train")
    keys = KeySet(found.tokens.keys[np.unique(found.rows)])
    table = read_pairs(pairs, "train")
    assert keys == KeySet(pl.concat([table["chosen_key"], table["rejected_key"]]))
