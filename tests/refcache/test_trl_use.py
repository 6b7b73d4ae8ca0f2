"""What users of TRL do around a training: sets of their own, settings, arguments, stored datasets."""

import warnings

import pytest

pytest.importorskip("trl", reason="TRL is not installed (pip install -e '.[bench]')")
pytestmark = pytest.mark.slow

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast  # noqa: E402
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer  # noqa: E402

from cache import CacheIncomplete  # noqa: E402
from refcache.trl import CachedDPOTrainer, CachedKTOTrainer, CachedReference  # noqa: E402
from tests.refcache.preferences import losses_of, publish  # noqa: E402
from tests.tiny import VOCABULARY  # noqa: E402

LOSSES = ["sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"]
LOSSES += ["apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"]  # all of TRL 1.16


def cached(place, **options):
    return place.trainer(CachedDPOTrainer, **{"reference_cache": place.cache, **options})


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": LOSSES, "loss_weights": [1 / (i + 1) for i in range(15)], "label_smoothing": 0.1},
        {"max_length": 3, "per_device_train_batch_size": 1},
        {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 3, "max_steps": -1, "num_train_epochs": 2},
        {"use_weighting": True, "f_divergence_type": "js_divergence", "loss_type": ["sigmoid", "ipo"]},
    ],
    ids=["every-loss", "responses-of-a-token", "accumulation", "weighting-and-divergence"],
)
def test_settings_have_the_losses_of_trls_own_precompute(place, settings):
    settings = {"max_steps": 4, **settings}
    losses = losses_of(cached(place, settings=settings))
    peer = place.trainer(DPOTrainer, settings={"precompute_ref_log_probs": True, **settings})
    assert losses == pytest.approx(losses_of(peer), rel=1e-5, abs=1e-5)
    assert len(set(losses)) == 4


@pytest.mark.parametrize("steps", [0, 2])
def test_sets_that_the_trainer_made_are_evaluated_again(place, steps):
    trainer = cached(place, eval_dataset=place.test, settings={"max_steps": steps or -1})
    if steps:
        losses_of(trainer)
    expected = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate(trainer.eval_dataset)["eval_loss"] == expected
    assert trainer.evaluate({"own": trainer.eval_dataset})["eval_own_loss"] == expected
    with pytest.raises(ValueError, match=r"remove_columns\(\['ref_chosen_logps', 'ref_rejected_logps'\]\)"):
        trainer.evaluate(trainer.eval_dataset.select(range(2)))


def test_sets_that_a_kto_trainer_made_are_evaluated_again(place, tmp_path):
    settings = {"per_device_eval_batch_size": 3}
    peer = place.trainer(KTOTrainer, config=KTOConfig, eval_dataset=place.test, settings=settings)
    rows = [*peer.train_dataset, *peer.eval_dataset]
    mismatched = publish(tmp_path / "kl", place.model, [(row["prompt_ids"], row["KL_completion_ids"]) for row in rows])
    options = {"eval_dataset": place.test, "reference_cache": [place.cache, mismatched], "settings": settings}
    trainer = place.trainer(CachedKTOTrainer, config=KTOConfig, **options)
    losses_of(trainer), losses_of(peer)
    expected = pytest.approx(peer.evaluate()["eval_loss"], abs=2e-5)
    assert trainer.evaluate()["eval_loss"] == trainer.evaluate(trainer.eval_dataset)["eval_loss"] == expected


def test_empty_sets_are_refused_by_name(place):
    with pytest.raises(ValueError, match="The test set is empty"):
        cached(place, eval_dataset={"test": place.test.select([])})
    with pytest.raises(ValueError, match="The test set is empty"):
        cached(place).evaluate({"test": place.test.select([])})
    with pytest.raises(ValueError, match=r"Nothing is left of the train set: .* max_length is 2"):
        cached(place, settings={"max_length": 2})


def test_a_missing_row_is_counted_in_the_rows_that_trl_kept(place):
    """TRL leaves out prompts that fill max_length before any row is looked up."""
    rows = list(place.pairs)
    rows[6] |= {"chosen": " w9 w9"}
    data = Dataset.from_list([{"prompt": "w5 " * 30, "chosen": " w4", "rejected": " w3"}, *rows])
    with pytest.raises(
        CacheIncomplete, match=r"row 6 of the train set \(counted from 0 in the 24 rows .* made of 25\)"
    ):
        cached(place, train_dataset=data, settings={"max_length": 25})


def test_an_evaluation_set_named_train_is_told_from_the_training_set(place):
    sets = {"train": Dataset.from_list([place.test[0] | {"chosen": " w9"}])}
    with pytest.raises(CacheIncomplete, match="missing: 1 as chosen response in the evaluation's train set"):
        cached(place, eval_dataset=sets)
    with pytest.raises(CacheIncomplete, match=r"1 of 2 responses are missing: 1 as .* in the evaluation's train set"):
        cached(place).evaluate(sets)


def test_arguments_that_python_would_refuse_are_refused(place):
    with pytest.raises(TypeError, match="model was given by position and again by name"):
        CachedDPOTrainer("a", model="b", reference_cache=place.cache)
    with pytest.raises(TypeError, match="30 positional arguments were given; DPOTrainer takes"):
        CachedDPOTrainer(*range(30), reference_cache=place.cache)


def test_the_configuration_of_another_trainer_is_refused(place):
    with pytest.raises(ValueError, match="args is a KTOConfig; a DPOConfig is needed"):
        cached(place, config=KTOConfig)
    with pytest.raises(ValueError, match="args is a DPOConfig; a KTOConfig is needed"):
        place.trainer(CachedKTOTrainer, reference_cache=place.cache, config=DPOConfig)


@pytest.mark.parametrize("folders", [[], None])
def test_no_folder_is_no_cache(place, folders):
    with pytest.raises(ValueError, match="at least one folder"):
        cached(place, reference_cache=folders)


def test_another_type_than_the_references_is_told(place):
    half = AutoModelForCausalLM.from_pretrained(place.model, dtype=torch.bfloat16)
    for options in ({"settings": {"bf16": True}}, {"model": half}):
        with pytest.warns(UserWarning, match="scored in float32 and the policy trains in bfloat16"):
            cached(place, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*was scored in")
        cached(place)


def test_texts_are_shown_by_the_tokenizer_that_trl_loads_itself(place, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=VOCABULARY, **sizes)).save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast.from_pretrained(place.model).save_pretrained(tmp_path / "model")
    rows = [place.pairs[0] | {"rejected": " w9 w9 w9"}]
    args = DPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(CacheIncomplete, match="instead of 'w9 w9 w9 </s>'"):
        CachedDPOTrainer(
            str(tmp_path / "model"), args=args, train_dataset=Dataset.from_list(rows), reference_cache=place.cache
        )


def test_what_trl_stores_with_a_dataset_is_never_taken_for_other_settings(place, tmp_path):
    """Its name for stored values leaves ld_alpha out (and max_length with keep_end)."""
    place.pairs.to_parquet(tmp_path / "pairs.parquet")
    data = Dataset.from_parquet(str(tmp_path / "pairs.parquet"), cache_dir=str(tmp_path / "hf"))
    for settings in ({}, {"ld_alpha": 0.0}):
        settings |= {"max_length": None}
        own = {"settings": settings | {"precompute_ref_log_probs": True}, "train_dataset": data}
        stand_in = place.trainer(DPOTrainer, ref_model=CachedReference(place.cache), **own)
        ours = cached(place, settings=settings, train_dataset=data)
        assert stand_in.train_dataset["ref_chosen_logps"][:] == pytest.approx(ours.train_dataset["ref_chosen_logps"][:])


def test_a_response_is_answered_by_whichever_cache_holds_it_or_more_of_it(place, tmp_path):
    prompt, response = place.rows[0]
    beginnings = [(p, r[:2]) for p, r in place.rows]
    short = publish(tmp_path / "short", place.model, beginnings)
    for order in ([short, place.cache], [place.cache, short]):
        reference = CachedReference(order)
        whole = reference.lookup.token_logps(prompt, response)
        assert len(whole) == len(response)
        for length in range(1, len(response)):
            assert reference.lookup.token_logps(prompt, response[:length]) == pytest.approx(whole[:length], abs=1e-5)


def test_a_saved_model_holds_nothing_of_the_reference(place, tmp_path):
    for trainer in (cached(place), place.trainer(DPOTrainer, ref_model=CachedReference(place.cache))):
        trainer.save_model(tmp_path)
        assert load_file(tmp_path / "model.safetensors").keys() == load_file(place.model / "model.safetensors").keys()
        assert not list(tmp_path.rglob("*.parquet"))
