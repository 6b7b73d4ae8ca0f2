"""Supervised fine-tuning on real ranks."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.integration.trainings import RanksEnded, read_table
from tests.pipeline.runs.test_sft import write_adapter
from tests.tiny import TINY_MODEL, write_model, write_sft, write_tokenizer

pytestmark = pytest.mark.slow


def test_sft_learns_from_scratch_and_reports_the_gradient_norm(nursery, tmp_path):
    rows, tokenizer = write_sft(tmp_path / "sft.parquet", 40), write_tokenizer(tmp_path / "tokenizer")
    nursery.sft(
        tmp_path,
        paths={
            "sft": rows,
            "tokenizer": tokenizer,
            "out": tmp_path / "reference",
            "history": tmp_path / "h.tsv",
            "metrics": tmp_path / "m.json",
        },
        params={"epochs": 8.0, "batch_size": 8, "micro_batch_size": 8, "learning_rate": 1e-2},
        model={"scratch": {"config": TINY_MODEL}},
    )
    history = read_table(tmp_path / "h.tsv")
    assert history[0]["loss"] == pytest.approx(
        math.log(64), abs=0.3
    )  # a random model is near uniform over its vocabulary
    assert history[-1]["loss"] < history[0]["loss"] - 0.3
    assert all(row["grad_norm"] > 0 for row in history)


def test_sft_of_a_given_model_divided_under_zero_three_is_that_of_one_rank(nursery, tmp_path):
    rows, model = write_sft(tmp_path / "sft.parquet", 24), write_model(tmp_path / "model")
    paths = {"sft": rows, "tokenizer": write_tokenizer(tmp_path / "tokenizer")}
    for name, ranks in (("one", {}), ("two", {"ranks": 2, "zero_stage": 3})):
        own = {"out": tmp_path / name, "history": tmp_path / f"{name}.tsv", "metrics": tmp_path / f"{name}.json"}
        params = {"epochs": 2.0, "batch_size": 8, "micro_batch_size": 4, "learning_rate": 1e-3} | ranks
        nursery.sft(tmp_path, paths=paths | own, params=params, model={"name": str(model)})
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    before = load_file(model / "model.safetensors")
    for name, expected in one.items():
        assert (before[name] != expected).any()
        torch.testing.assert_close(two[name], expected, atol=1e-4, rtol=1e-3)


def fine_tune(nursery, folder, model, **params):
    """Of `model`, on a few made-up rows, into folder/reference."""
    paths = {"sft": write_sft(folder / "sft.parquet", 8), "tokenizer": write_tokenizer(folder / "tokenizer")}
    paths |= {"out": folder / "reference", "history": folder / "h.tsv", "metrics": folder / "m.json"}
    loop = {"epochs": 1.0, "batch_size": 8, "micro_batch_size": 8, "learning_rate": 1e-2, "warmup_share": 0.0}
    nursery.sft(folder, paths=paths, params=loop | params, model=model)
    return json.loads((folder / "m.json").read_text())


def test_sft_trains_all_of_a_model_that_an_adapter_was_merged_into(nursery, tmp_path):
    """Whatever the adapter had frozen; an adapter of biases alone would leave the rest so."""
    base = write_model(tmp_path / "base")
    write_adapter(tmp_path / "adapter", base, 1, bias="lora_only")
    summary = fine_tune(nursery, tmp_path, {"name": str(base), "adapter": str(tmp_path / "adapter")})
    assert summary["trained_parameters"] == summary["parameters"] > 10_000
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "reference"))
    assert all((before[name] != after[name]).any() for name in before)


def test_a_model_that_cannot_be_saved_is_refused_before_it_is_trained(nursery, tmp_path):
    model = write_model(tmp_path / "model")
    (model / "generation_config.json").write_text('{"pad_token_id": -1}')
    with pytest.raises(RanksEnded, match=r"generation_config\.json .*pad_token_id"):
        fine_tune(nursery, tmp_path, {"name": str(model)})
    assert not list(tmp_path.glob("work/training/*/history.tsv"))


def test_under_zero_three_a_checkpoint_with_more_tensors_than_the_model_is_refused_too(nursery, tmp_path):
    model = write_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors") | {"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1)}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RanksEnded, match="weight_scale_inv"):
        fine_tune(nursery, tmp_path, {"name": str(model)}, ranks=2, zero_stage=3, micro_batch_size=4)
