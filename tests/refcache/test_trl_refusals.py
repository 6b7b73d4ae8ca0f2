"""What a cache lacks or can't serve ends a trainer before its first step, in one message."""

import pytest

pytest.importorskip("trl", reason="TRL is not installed (pip install -e '.[bench]')")
pytestmark = pytest.mark.slow

import polars as pl  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from trl import DPOTrainer  # noqa: E402

from cache import CacheIncomplete, CacheMismatch, prompt_key, response_key  # noqa: E402
from refcache.trl import CachedDPOTrainer, CachedReference  # noqa: E402
from tests.refcache.preferences import publish  # noqa: E402
from tests.tiny import write_model  # noqa: E402


def refused(place, error=CacheIncomplete, **options):
    with pytest.raises(error) as caught:
        place.trainer(CachedDPOTrainer, reference_cache=place.cache, **options)
    return str(caught.value)


def changed(place, number, **change):
    rows = list(place.pairs)
    rows[number] = rows[number] | change
    return Dataset.from_list(rows)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": "w9 w9 w9 w9"}, "nor any other response"),
        ({"rejected": " w9 w9 w9 </s>"}, "the closest"),
    ],
)
def test_a_missing_row_is_named_before_the_first_step_and_written_for_score(place, tmp_path, change, reason):
    settings = {"output_dir": str(tmp_path)}
    told = refused(place, train_dataset=changed(place, 5, **change), settings=settings)
    assert "of row 5 of the train set" in told and reason in told
    [file] = tmp_path.glob("unscored-*/responses.parquet")
    rows = pl.read_parquet(file)
    asked = list(zip(rows["prompt_ids"].to_list(), rows["response_ids"].to_list(), strict=True))
    assert len(asked) == (2 if "prompt" in change else 1)
    assert rows["response_key"].to_list() == sorted(response_key(*row) for row in asked)
    assert rows["prompt_key"].to_list() == [prompt_key(prompt) for prompt, _ in asked]
    given = place.pairs[5] | change
    assert all(given["prompt"] == text for text in rows["prompt_text"])


def test_rows_that_several_sets_miss_are_told_at_once(place, tmp_path):
    other = {"test": changed(place, 3, prompt="w9 w9"), "again": place.pairs}
    settings = {"output_dir": str(tmp_path)}
    told = refused(place, train_dataset=changed(place, 7, chosen=" w9 </s>"), eval_dataset=other, settings=settings)
    assert "1 as chosen response in the train set" in told and "1 as rejected response in the test set" in told
    assert "3 of 144 responses are missing" in told


def test_what_a_template_writes_after_the_end_is_told_with_the_setting_that_keeps_it(place):
    told = refused(place, train_dataset=changed(place, 2, chosen=place.pairs[2]["chosen"] + " w7 </s>"))
    assert "without 'w7 </s>' at the end" in told and "prepare.after_end" in told


def test_a_prompt_that_lost_its_beginning_is_another_prompt(place):
    told = refused(place, settings={"max_length": 12, "truncation_mode": "keep_end"})
    assert "a prompt that lost its beginning" in told


def test_where_no_prompt_is_left_nothing_can_be_scored(place):
    told = refused(place, settings={"max_length": 2, "truncation_mode": "keep_end"})
    assert "Nothing is left of its prompt" in told and "refcache score" not in told


def test_a_reference_of_ones_own_beside_a_cache_is_refused(place):
    own = AutoModelForCausalLM.from_pretrained(place.model)
    assert "one or the other" in refused(place, ValueError, ref_model=own)


def test_a_reference_that_moves_is_refused(place):
    assert "as it was scored" in refused(place, ValueError, settings={"sync_ref_model": True})


def test_streams_images_and_precomputed_columns_are_refused(place):
    assert "IterableDataset" in refused(place, ValueError, train_dataset=place.pairs.to_iterable_dataset())
    assert "The test set is a" in refused(place, ValueError, eval_dataset={"test": place.pairs.to_iterable_dataset()})
    images = place.pairs.add_column("images", [[]] * len(place.pairs))
    assert "has images" in refused(place, ValueError, train_dataset=images)
    own = place.pairs.add_column("ref_chosen_logps", [0.0] * len(place.pairs))
    assert "brings ref_chosen_logps" in refused(place, ValueError, eval_dataset=own)


def test_a_trainer_that_asks_for_logits_is_refused(place):
    with pytest.raises(ValueError, match="asks its reference for logits"):
        CachedReference(place.cache)(torch.ones(1, 4, dtype=torch.long), use_cache=False)


def test_caches_of_two_references_are_refused(place, tmp_path):
    other = publish(tmp_path / "logps", write_model(tmp_path / "model", seed=1), place.rows)
    with pytest.raises(CacheMismatch, match="two references: weights differ"):
        CachedReference([place.cache, other])


def test_trl_never_takes_what_it_precomputed_with_one_reference_for_another(place, tmp_path):
    """It stores that under a name made of the reference's tensors, of which a stand-in has none of its own."""
    data = Dataset.from_parquet(_saved(place.pairs, tmp_path / "pairs.parquet"), cache_dir=str(tmp_path / "hf"))
    other = publish(tmp_path / "logps", write_model(tmp_path / "model", seed=1), place.rows)
    settings = {"precompute_ref_log_probs": True}
    columns = []
    for cache in (place.cache, other):
        trainer = place.trainer(DPOTrainer, ref_model=CachedReference(cache), train_dataset=data, settings=settings)
        columns.append(trainer.train_dataset["ref_chosen_logps"][:])
    assert columns[0] != columns[1]


def _saved(dataset, path):
    dataset.to_parquet(path)
    return str(path)
