"""The one place where transformers models and configs are opened: whole and as meant, or an error that says why not.

transformers fills what a checkpoint lacks with random numbers and leaves out what it can't place, under a warning. A
reference cache is worth what its identity promises, so here both are errors.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import RequestError
from pipeline.hub import meet_hub
from pipeline.model.digests import refuse_pointer, tensor_files

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

ADAPTER_CONFIG = "adapter_config.json"
SHOWN_TENSORS = 4  # in an error
_REMEDY = (
    "Expected is a transformers folder with config.json and *.safetensors, or (model.name) the id of a model on the "
    "Hugging Face hub, which needs a network or a copy in its cache, and for gated models a login."
)


def open_config(
    source: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> "PreTrainedConfig":
    """config.json of a folder or hub id, with the architecture's defaults. Raises RequestError as `open_model`."""
    from transformers import AutoConfig

    if isinstance(source, Path) and not source.is_dir():
        raise RequestError(f"{source} does not exist. {_REMEDY}")
    refuse_adapter(source)
    with translated(source):
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)


def open_model(
    source: str | Path, *, dtype: "torch.dtype", revision: str | None = None, trust_remote_code: bool = False
) -> "PreTrainedModel":
    """The causal language model of a folder or hub id, in evaluation mode.

    Raises RequestError for what can't be loaded, for an adapter's folder, for quantised weights, and where any tensor
    is missing, unexpected, of another shape, or tied by the config to one with other values.
    """
    from pipeline.model.attention import use_exact_attention

    model = _opened(source, revision=revision, trust_remote_code=trust_remote_code, dtype=dtype)
    _require_ties(Path(source), model)
    with translated(source):
        use_exact_attention(model)
    return model


def require_whole(source: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> None:
    """RequestError as `open_model`, by the files' headers alone; under ZeRO-3 transformers does not look."""
    _opened(source, revision=revision, trust_remote_code=trust_remote_code, device_map="meta")


def _opened(source: str | Path, *, revision: str | None, trust_remote_code: bool, **options: Any) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    config = open_config(source, revision=revision, trust_remote_code=trust_remote_code)
    refuse_quantised(source, config)
    if is_multimodal(config):
        raise RequestError(
            f"{source} is a multimodal model ({config.model_type}), and only texts are scored and trained here. Give "
            "it as model.name: `refcache sft` writes its text part as a model of its own, where that computes the same."
        )
    _refuse_damaged_files(Path(source))
    with translated(source):
        model, found = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            revision=revision,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # judged below, by name
            **options,
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise RequestError(_adapter_message(source, None))
    require_fitting(Path(source), found)
    return model


def model_of_config(
    source: str | Path, *, dtype: "torch.dtype | None" = None, trust_remote_code: bool = False
) -> "PreTrainedModel":
    """The architecture with random weights, on the device of the context; for shapes and names, not for numbers."""
    from transformers import AutoModelForCausalLM

    config = open_config(source, trust_remote_code=trust_remote_code)
    with translated(source):
        return AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust_remote_code, **({} if dtype is None else {"dtype": dtype})
        )


def is_multimodal(config: "PreTrainedConfig") -> bool:
    """Whether the config holds a language model's beside those of other parts."""
    parts = ("vision_config", "audio_config", "speech_config")
    return config.get_text_config() is not config and any(getattr(config, part, None) is not None for part in parts)


def refuse_adapter(source: str | Path) -> None:
    """RequestError for the folder of a peft adapter, which is no model but belongs to one."""
    file = Path(source) / ADAPTER_CONFIG
    if file.exists():
        raise RequestError(_adapter_message(source, file))


@contextmanager
def translated(source: str | Path, *, what: str = "", remedy: str = _REMEDY) -> Iterator[None]:
    """Whatever transformers raises while opening `source` becomes a RequestError with file, reason and remedy.

    what: the message's first words instead of the source.
    """
    if not Path(source).exists():
        meet_hub()
    try:
        yield
    except RequestError:
        raise
    except Exception as error:  # checkpoints fail in as many ways as there are libraries below
        _refuse_pointers(Path(source))
        reason = " ".join(str(error).split()) or "no reason given"
        if "trust_remote_code" in reason:
            remedy = "Its code comes with it: read that, then set model.trust_remote_code: true to run it."
        raise RequestError(f"{what or source} can't be opened ({type(error).__name__}: {reason}). {remedy}") from error


def _adapter_message(source: str | Path, file: Path | None) -> str:
    import json

    base = None
    if file is not None:
        try:
            base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
        except (OSError, ValueError, AttributeError):
            base = None
    return (
        f"{source} holds a peft adapter ({ADAPTER_CONFIG}), which is no model by itself. Set model.name to the model "
        f"it was trained on{f' ({base})' if base else ''} and model.adapter to {source}; `refcache sft` merges them."
    )


def refuse_quantised(source: str | Path, config: "PreTrainedConfig") -> None:
    settings: Any = getattr(config, "quantization_config", None)
    if settings is None:
        return
    method = settings.get("quant_method") if isinstance(settings, Mapping) else getattr(settings, "quant_method", None)
    raise RequestError(
        f"{source} holds quantised weights ({getattr(method, 'value', method) or 'of an unnamed method'}, by its "
        "config's quantization_config). What is scored, trained from and digested must be one and the same plain "
        "model. Use the checkpoint that it was made of, or save it dequantised once, without quantization_config; "
        "score.quantization lets vLLM quantise plain weights while scoring."
    )


def _refuse_damaged_files(folder: Path) -> None:
    """RequestError for a local folder whose safetensors files are cut, absent or no such files; reads headers only."""
    _refuse_pointers(folder)
    if any(folder.glob("*.safetensors")):
        tensor_files(folder)


def _refuse_pointers(folder: Path) -> None:
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if file.is_file():
            refuse_pointer(file)


def require_fitting(source: Path, found: Mapping[str, Any]) -> None:
    """RequestError unless every tensor of the model came from the checkpoint, and the checkpoint holds no other."""
    unexpected = sorted(found["unexpected_keys"])
    kinds = {
        "missing": sorted(found["missing_keys"]),
        "without a place in the architecture": unexpected,
        "of another shape": [
            f"{name} ({list(stored)} stored, {list(own)} in the model)"
            for name, stored, own in sorted(found["mismatched_keys"])
        ],
        "not read": list(found["error_msgs"]),
    }
    problems = "; ".join(listed(kind, tensors) for kind, tensors in kinds.items() if tensors)
    if problems:
        raise RequestError(
            f"{_weights_of(source, unexpected)} does not fit the model of its config.json; tensors {problems}. "
            "transformers would fill gaps with random numbers, other ones at every start, and leave out what has no "
            "place. Copy or download the model again; after a conversion or merge of your own, save it anew with the "
            "class that it is loaded with."
        )


def listed(kind: str, tensors: list[str]) -> str:
    """For messages: what is wrong with tensors, how many, and the first of them."""
    more = ", ..." if len(tensors) > SHOWN_TENSORS else ""
    return f"{kind} ({len(tensors)}): {', '.join(tensors[:SHOWN_TENSORS])}{more}"


def _weights_of(source: Path, tensors: list[str]) -> str:
    """The file of the first of these tensors, else all weight files, else the source."""
    if not source.is_dir() or not any(source.glob("*.safetensors")):
        return str(source)
    files = tensor_files(source)
    if tensors and tensors[0] in files:
        return str(files[tensors[0]])
    names = sorted({file.name for file in files.values()})
    return str(source / names[0]) if len(names) == 1 else f"{source} ({len(names)} files)"


def _require_ties(source: Path, model: "PreTrainedModel") -> None:
    """RequestError where the config ties two tensors that the checkpoint stores with different values.

    transformers then leaves them apart, vLLM ties them.
    """
    kept = getattr(model, "all_tied_weights_keys", {})
    wanted = model.get_expanded_tied_weights_keys(all_submodels=True)
    for name, other in sorted(wanted.items()):
        if name not in kept:
            raise RequestError(
                f"{_weights_of(source, [name])} holds {name} and {other} with different values, while config.json says "
                "that they are one (tie_word_embeddings). Set tie_word_embeddings: false in config.json if both are "
                "meant, or remove the tensor that is not."
            )
