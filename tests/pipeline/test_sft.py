"""sft without training: the model as it is, and models that can't serve."""

import json

import pytest

from pipeline.errors import RequestError
from pipeline.params import ModelParams, SftParams
from pipeline.sft import fine_tune
from pipeline.tokenizer import load_tokenizer as load_project_tokenizer
from pipeline.tokenizer import open_tokenizer
from pipeline.weights import reference_identity
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
    assert len(load_project_tokenizer(ModelParams(name=str(start)))) == len(open_tokenizer(start)) == 64


def test_a_folder_that_is_no_model_is_a_wrong_request_that_names_it(tmp_path):
    with pytest.raises(RequestError, match=r"model\.name '.*/nothing' can't be loaded"):
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
    from pipeline.models import initial_model, load_tokenizer

    word = scratch.get("architecture", "hiden_size")
    with pytest.raises(RequestError, match=word):
        initial_model(
            ModelParams.model_validate({"scratch": scratch}), load_tokenizer(write_tokenizer(tmp_path / "tokenizer"))
        )
