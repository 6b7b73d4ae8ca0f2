"""sft without training: the model as it is, and models that can't serve."""

import json

import pytest

from pipeline.errors import RequestError
from pipeline.model.tokenizer import load_tokenizer, open_prepared_tokenizer, open_tokenizer
from pipeline.params import ModelParams, SftParams
from pipeline.reference.identity import reference_identity
from pipeline.runs.sft import fine_tune
from tests.tiny import TINY_MODEL, write_model, write_sft, write_tokenizer


def run(tmp_path, model: dict, *, rows: int = 4, epochs: float = 0.0):
    return fine_tune(
        sft=write_sft(tmp_path / "sft.parquet", rows) if rows else tmp_path / "absent.parquet",
        tokenizer=write_tokenizer(tmp_path / "tokenizer"),
        out=tmp_path / "reference",
        history=tmp_path / "results/history.tsv",
        metrics=tmp_path / "results/metrics.json",
        params=SftParams(epochs=epochs),
        model=ModelParams.model_validate(model),
    )


def test_zero_epochs_take_a_local_model_as_it_is(tmp_path):
    start = write_model(tmp_path / "start")
    run(tmp_path, {"name": str(start)})
    identities = [reference_identity(f, dtype="float32", quantization=None) for f in (start, tmp_path / "reference")]
    assert identities[0].weights == identities[1].weights
    assert (tmp_path / "reference/tokenizer.json").read_bytes() == (start / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "results/metrics.json").read_text())["steps"] == 0


def test_a_model_trained_here_can_start_another_project(tmp_path):
    """Its tokenizer comes back as it was saved, although its Qwen2 config names another tokenizer class."""
    start = write_model(tmp_path / "start")
    assert len(load_tokenizer(ModelParams(name=str(start)))) == len(open_tokenizer(start)) == 64


def test_a_folder_that_is_no_model_is_a_wrong_request_that_names_it(tmp_path):
    with pytest.raises(RequestError, match=r"/nothing can't be opened .*model\.name"):
        run(tmp_path, {"name": str(tmp_path / "nothing")})


def test_a_model_with_fewer_embeddings_than_tokens_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.tiny.VOCABULARY", 32)
    small = write_model(tmp_path / "small")
    monkeypatch.undo()
    with pytest.raises(RequestError, match="32 embeddings, its tokenizer 64 tokens"):
        run(tmp_path, {"name": str(small)})


def test_missing_rows_name_the_stage_that_writes_them(tmp_path):
    with pytest.raises(RequestError, match="refcache prepare"):
        run(tmp_path, {"scratch": {"config": TINY_MODEL}}, rows=0, epochs=1.0)


@pytest.mark.parametrize("scratch", [{"architecture": "qwen22"}, {"config": {"hiden_size": 8}}])
def test_misspelt_scratch_models_are_named(tmp_path, scratch):
    from pipeline.trainable.initial import initial_model

    word = scratch.get("architecture", "hiden_size")
    with pytest.raises(RequestError, match=word):
        initial_model(
            ModelParams.model_validate({"scratch": scratch}),
            open_prepared_tokenizer(write_tokenizer(tmp_path / "tokenizer")),
        )


def write_adapter(folder, base, seed, **config):
    """A LoRA with random A and B on every attention projection of `base`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        shape = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = get_peft_model(model, LoraConfig(**shape | config))
    model.save_pretrained(folder)
    return model.eval()


def test_an_adapter_becomes_part_of_the_reference_and_of_its_identity(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    start, ids = write_model(tmp_path / "start"), torch.tensor([[3, 9, 27, 17]])
    identities = {reference_identity(start, dtype="float32", quantization=None)}
    for seed in (1, 2):
        adapted = write_adapter(tmp_path / f"adapter-{seed}", start, seed)
        run(tmp_path, {"name": str(start), "adapter": str(tmp_path / f"adapter-{seed}")})
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "reference").eval()
        with torch.inference_mode():
            torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-4, rtol=1e-4)
        assert not (tmp_path / "reference/adapter_config.json").exists()
        identities.add(reference_identity(tmp_path / "reference", dtype="float32", quantization=None))
    assert len({identity.weights for identity in identities}) == 3
    assert len({identity.config for identity in identities}) == 1  # only the weights differ


def test_an_adapter_alone_is_no_reference_and_the_message_says_how_to_make_one(tmp_path):
    start = write_model(tmp_path / "start")
    write_adapter(tmp_path / "adapter", start, 1)
    with pytest.raises(RequestError, match=r"peft adapter.*model\.adapter.*dvc repro sft"):
        reference_identity(tmp_path / "adapter", dtype="float32", quantization=None)


@pytest.mark.parametrize("damage", ["absent", "of another model", "no adapter"])
def test_an_adapter_that_cannot_be_merged_is_a_wrong_request_that_names_it(tmp_path, damage, monkeypatch):
    start, adapter = write_model(tmp_path / "start"), tmp_path / "adapter"
    if damage == "no adapter":
        write_tokenizer(adapter)
    elif damage == "of another model":
        monkeypatch.setitem(TINY_MODEL, "hidden_size", 64)
        write_adapter(adapter, write_model(tmp_path / "wide"), 1)
        monkeypatch.undo()
    with pytest.raises(RequestError, match=r"model\.adapter '.*adapter' can't be merged"):
        run(tmp_path, {"name": str(start), "adapter": str(adapter)})


def test_an_adapter_without_a_model_is_refused():
    with pytest.raises(ValueError, match=r"model\.adapter belongs to model\.name"):
        ModelParams.model_validate({"scratch": {}, "adapter": "some/adapter"})
