"""A model is opened whole and as meant, or not at all."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.errors import RequestError
from pipeline.model.opening import open_config, open_model
from tests import ROOT
from tests.tiny import write_model

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 123\n"


def changed(folder: Path, *, remove: str = "^$", add: dict[str, torch.Tensor] | None = None, **config) -> Path:
    """The model with other tensors in its file and other values in its config."""
    file = folder / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if not re.search(remove, name)}
    save_file(kept | (add or {}), file, metadata={"format": "pt"})
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | config))
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(RequestError) as error:
        open_model(folder, dtype=torch.float32)
    return str(error.value)


@pytest.mark.parametrize(
    ("remove", "first"),
    [
        (r"layers\.1\.mlp", "model.layers.1.mlp.down_proj.weight"),
        ("lm_head", "lm_head.weight"),
        (r"^model\.norm", "model.norm.weight"),
    ],
)
def test_missing_tensors_are_an_error_naming_them_and_the_file(tmp_path, remove, first):
    folder = changed(write_model(tmp_path, tie_word_embeddings=False), remove=remove)
    assert f"missing ({3 if 'mlp' in remove else 1}): {first}" in refusal(folder)
    assert str(folder / "model.safetensors") in refusal(folder)


def test_tensors_without_a_place_are_an_error(tmp_path):
    scale = {"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1)}
    message = refusal(changed(write_model(tmp_path), add=scale))
    assert f"without a place in the architecture (1): {next(iter(scale))}" in message


def test_a_tensor_of_another_shape_is_an_error_with_both_shapes(tmp_path):
    message = refusal(changed(write_model(tmp_path), add={"model.norm.weight": torch.ones(3)}))
    assert "of another shape (1): model.norm.weight ([3] stored, [32] in the model)" in message


def test_a_quantised_checkpoint_is_refused_by_its_method(tmp_path):
    message = refusal(changed(write_model(tmp_path), quantization_config={"quant_method": "fp8"}))
    assert "quantised weights (fp8" in message


def test_a_head_that_the_config_ties_and_the_file_does_not_is_an_error(tmp_path):
    other = {"lm_head.weight": torch.ones(64, 32)}
    assert "holds lm_head.weight and model.embed_tokens.weight with different values" in refusal(
        changed(write_model(tmp_path), add=other)
    )


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_as_the_config_says_is_opened_with_the_files_own_values(tmp_path, tied):
    """Known leftovers of older checkpoints are no fault: rotary buffers, and the head beside tied embeddings."""
    folder = write_model(tmp_path, tie_word_embeddings=tied)
    leftovers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    if tied:
        leftovers["lm_head.weight"] = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].clone()
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    opened = open_model(changed(folder, add=leftovers), dtype=torch.float32)
    assert not opened.training
    assert all(torch.equal(plain[name], tensor) for name, tensor in opened.state_dict().items())


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("model.safetensors", LFS_POINTER, "model.safetensors is a Git LFS pointer"),
        ("config.json", LFS_POINTER, "config.json is a Git LFS pointer"),
        ("config.json", '{"model_type": "nonesuch"}', "nonesuch"),
        ("config.json", "[]", "can't be opened"),
        ("config.json", None, "can't be opened"),
        ("model.safetensors", None, "can't be opened"),
        ("model.safetensors", "x" * 100, "is no safetensors file"),
        ("model.safetensors", "", "is no safetensors file"),
    ],
)
def test_whatever_is_wrong_with_the_files_is_a_wrong_request(tmp_path, file, content, expected):
    folder = write_model(tmp_path)
    (folder / file).unlink() if content is None else (folder / file).write_text(content)
    assert expected in refusal(folder)


def test_an_adapters_folder_is_refused_naming_both_settings(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    for opening in (lambda: open_config(tmp_path), lambda: open_model(tmp_path, dtype=torch.float32)):
        with pytest.raises(RequestError, match=rf"Set model.name to .*\(some/base\) and model.adapter to {tmp_path}"):
            opening()


def test_code_that_comes_with_a_model_names_the_setting_that_runs_it(tmp_path):
    auto_map = {"auto_map": {"AutoConfig": "own.OwnConfig"}, "model_type": "own"}
    (tmp_path / "config.json").write_text(json.dumps(auto_map))
    with pytest.raises(RequestError, match=r"set model\.trust_remote_code: true"):
        open_config(tmp_path)


def test_no_other_module_opens_models():
    """One door: what is checked there can't be forgotten elsewhere."""
    doors = {
        file.relative_to(ROOT).as_posix()
        for room in ("pipeline", "stages", "studies")
        for file in (ROOT / room).rglob("*.py")
        if re.search(r"\bAuto(Model\w*|Config)\.from_(pretrained|config)\(", file.read_text())
    }
    # opening; the same with a text part's checks; and models from scratch.
    assert doors == {"pipeline/model/opening.py", "pipeline/model/text_part.py", "pipeline/trainable/initial.py"}
