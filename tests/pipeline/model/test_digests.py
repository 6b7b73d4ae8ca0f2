"""The digests that make a model folder the same reference, or another one."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline.errors import RequestError
from pipeline.model.digests import config_digest, weights_digest
from pipeline.reference.identity import engine_version, reference_identity

TENSORS = {
    "embed": np.arange(24, dtype=np.float32).reshape(6, 4),
    "block.0.weight": np.ones((4, 4), dtype=np.float32),
    "scale": np.array(2.0, dtype=np.float32),
    "none": np.zeros((0, 4), dtype=np.float32),
}
CONFIG = {"model_type": "qwen2", "vocab_size": 6, "text_config": {"hidden_size": 4, "dtype": "float32"}}


def write_tensors(folder, tensors=TENSORS, config=CONFIG):
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_sharded(folder, tensors=TENSORS):
    folder.mkdir(parents=True)
    weight_map = {}
    for number, (name, values) in enumerate(reversed(tensors.items())):
        file = f"model-{number + 1:05d}-of-{len(tensors):05d}.safetensors"
        save_file({name: values}, folder / file, metadata={"format": "pt"})
        weight_map[name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def test_a_moved_folder_is_the_same_model(tmp_path):
    here = write_tensors(tmp_path / "here")
    before = reference_identity(here, dtype="float32", quantization=None)
    moved = shutil.move(here, tmp_path / "elsewhere")
    assert reference_identity(moved, dtype="float32", quantization=None) == before


def test_resharded_weights_are_the_same_model(tmp_path):
    assert weights_digest(write_tensors(tmp_path / "one")) == weights_digest(write_sharded(tmp_path / "many"))


def test_only_the_files_of_the_index_count(tmp_path):
    folder = write_sharded(tmp_path / "many")
    before = weights_digest(folder)
    save_file({"embed": TENSORS["embed"] + 1}, folder / "consolidated.safetensors")
    assert weights_digest(folder) == before


def changed(name):
    flipped = TENSORS[name].copy()
    flipped.flat[-1] += 1e-6
    return TENSORS | {name: flipped}


@pytest.mark.parametrize(
    "tensors",
    [
        pytest.param(changed("block.0.weight"), id="one weight changed"),
        pytest.param({("renamed" if k == "embed" else k): v for k, v in TENSORS.items()}, id="tensor renamed"),
        pytest.param(TENSORS | {"embed": TENSORS["embed"].reshape(4, 6)}, id="reshaped"),
        pytest.param(TENSORS | {"embed": TENSORS["embed"].view(np.int32)}, id="same bytes, other type"),
        pytest.param({k: v for k, v in TENSORS.items() if k != "scale"}, id="tensor gone"),
        pytest.param(
            TENSORS | {"embed": TENSORS["block.0.weight"], "block.0.weight": TENSORS["embed"]}, id="tensors swapped"
        ),
    ],
)
def test_other_weights_are_another_model(tmp_path, tensors):
    assert weights_digest(write_tensors(tmp_path / "a")) != weights_digest(write_tensors(tmp_path / "b", tensors))


def test_config_ignores_what_changes_no_number(tmp_path):
    noise = {
        "_name_or_path": "/somewhere",
        "transformers_version": "9.9",
        "torch_dtype": "bfloat16",
        "use_cache": False,
    }
    quiet = write_tensors(tmp_path / "a")
    noisy = write_tensors(tmp_path / "b", config=CONFIG | noise | {"text_config": {"hidden_size": 4, "dtype": "bf16"}})
    assert config_digest(quiet) == config_digest(noisy)


@pytest.mark.parametrize("change", [{"rope_theta": 1e6}, {"text_config": {"hidden_size": 8}}, {"model_type": "llama"}])
def test_another_config_is_another_model(tmp_path, change):
    assert config_digest(write_tensors(tmp_path / "a")) != config_digest(
        write_tensors(tmp_path / "b", config=CONFIG | change)
    )


def test_the_models_own_code_counts(tmp_path):
    folder = write_tensors(tmp_path / "a", config=CONFIG | {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}})
    (folder / "modeling.py").write_text("scale = 1")
    before = config_digest(folder)
    (folder / "modeling.py").write_text("scale = 2")
    assert config_digest(folder) != before


def test_dtype_and_quantization_belong_to_the_identity(tmp_path):
    folder = write_tensors(tmp_path / "a")
    plain = reference_identity(folder, dtype="float32", quantization=None)
    assert plain.differences(reference_identity(folder, dtype="bfloat16", quantization="fp8")).keys() == {
        "dtype",
        "quantization",
    }
    assert plain.engine == "vllm" and plain.adapter is None


def test_the_engines_version_has_no_build_suffix():
    assert "+" not in engine_version()
    assert engine_version().count(".") >= 2


def test_bin_weights_are_refused_with_the_remedy(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(RequestError, match="safetensors"):
        weights_digest(tmp_path)


def test_a_folder_without_weights_names_the_stage_that_writes_them(tmp_path):
    with pytest.raises(RequestError, match="dvc repro sft"):
        weights_digest(tmp_path)


@pytest.mark.parametrize("keep", [4, 40, -1])
def test_a_file_cut_short_is_refused(tmp_path, keep):
    file = write_tensors(tmp_path / "a") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(RequestError, match=r"model\.safetensors"):
        weights_digest(tmp_path / "a")


def test_a_shard_missing_from_the_folder_is_named(tmp_path):
    folder = write_sharded(tmp_path / "a")
    (folder / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(RequestError, match="model-00002-of-00004"):
        weights_digest(folder)


def test_two_models_in_one_folder_are_refused(tmp_path):
    folder = write_tensors(tmp_path / "a")
    save_file(TENSORS, folder / "other.safetensors")
    with pytest.raises(RequestError, match="twice"):
        weights_digest(folder)


def test_a_broken_config_is_a_wrong_request(tmp_path):
    folder = write_tensors(tmp_path / "a")
    (folder / "config.json").write_text("{")
    with pytest.raises(RequestError, match=r"config\.json"):
        config_digest(folder)
