"""A generation_config that transformers loads and does not save must not cost a trained model."""

import json

import pytest
import torch

from pipeline.errors import RequestError
from pipeline.model.generation import make_savable
from pipeline.model.opening import open_model
from tests.tiny import write_model


def model_with(tmp_path, **generation):
    folder = write_model(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return open_model(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    ("generation", "unset"),
    [
        ({"do_sample": False, "temperature": 0.7}, ["temperature"]),
        ({"temperature": 0.6, "top_p": 0.9, "max_length": 99}, ["temperature", "top_p"]),
        ({"do_sample": False, "top_k": 5}, ["top_k"]),
        ({"early_stopping": True, "length_penalty": 0.5}, ["early_stopping", "length_penalty"]),
        ({"do_sample": True, "temperature": 0.7, "eos_token_id": [2, 7]}, []),
    ],
)
def test_what_greedy_decoding_does_not_read_is_unset_and_the_rest_stays(tmp_path, capsys, generation, unset):
    model = model_with(tmp_path, **generation)
    make_savable(model)
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/generation_config.json").read_text())
    assert not any(name in saved for name in unset)
    assert {name: saved.get(name) for name in generation if name not in unset} == {
        name: value for name, value in generation.items() if name not in unset
    }
    said = capsys.readouterr().err
    assert all(name in said for name in unset) and ("unset" in said) == bool(unset)


def test_what_stays_invalid_is_refused_by_name(tmp_path):
    with pytest.raises(RequestError, match=r"generation_config\.json of .*/model .*pad_token_id"):
        make_savable(model_with(tmp_path, pad_token_id=-1))
