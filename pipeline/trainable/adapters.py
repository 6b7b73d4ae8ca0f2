"""Opening peft adapters: every tensor in its place, on the base that it was trained on, or an error that says why not.

peft leaves out what it can't place, under a warning, and starts what it doesn't find at random.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.errors import RequestError, RunFailed
from pipeline.model.opening import ADAPTER_CONFIG, listed

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

# How a LoRA may have begun. pissa and olora change the base as well, in a way that loading repeats exactly; what is
# missing here changes it by random numbers (pissa_niter_*), by data (corda) or by quantising it (loftq).
EXACT_STARTS = (True, False, "gaussian", "eva", "orthogonal", "pissa", "olora")


def open_adapter(model: "PreTrainedModel", adapter: str | Path, *, failed: str) -> "PeftModel":
    """`model` with the adapter (local folder or hub id) in place, in evaluation mode; `model` itself is changed.

    Raises RequestError, which begins with `failed`: for an adapter that is absent, of a kind that can't be merged or
    whose base can't be had exactly, and unless each of its tensors is in the model and none of the model's is missing.
    """
    from peft import PeftConfig, PeftModel
    from peft.utils import load_peft_weights

    with _translated(failed), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about what is judged here
        config = PeftConfig.from_pretrained(str(adapter))
        _refuse_kind(config, failed)
        stored = load_peft_weights(str(adapter), device="cpu")
        _fit_vocabulary(model, adapter, stored, failed)
        adapted = PeftModel.from_pretrained(model, str(adapter))
        _require_all(adapted, stored, failed)
    return adapted.eval()


def merged(adapted: "PeftModel", *, failed: str) -> "PreTrainedModel":
    """The plain weights with the adapter added. Raises RequestError as `open_adapter`, also for numbers not finite."""
    _untie(adapted)
    with _translated(failed), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of ties, which are undone here
        model: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    return model


@contextmanager
def _translated(failed: str) -> Iterator[None]:
    try:
        yield
    except (RequestError, RunFailed):
        raise
    except Exception as error:  # of peft, safetensors, the hub and whatever a kind of adapter needs
        reason = " ".join(str(error).split()) or "no reason given"
        raise RequestError(
            f"{failed} ({type(error).__name__}: {reason}). It must be a peft adapter, a folder with {ADAPTER_CONFIG} "
            "and adapter_model.safetensors or a hub id, of this very model."
        ) from error


def _refuse_kind(config: "PeftConfig", failed: str) -> None:
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise RequestError(
            f"{failed}: its kind, {kind}, adds tokens or layers instead of changing weights, so there are no merged "
            "weights that vLLM could score. Kinds that can be merged are LORA (rsLoRA and DoRA too), IA3, LOHA, LOKR, "
            "ADALORA, OFT, BOFT, VERA and the like."
        )
    start = getattr(config, "init_lora_weights", True)
    if kind == "LORA" and start not in EXACT_STARTS:
        raise RequestError(
            f"{failed}: it began with init_lora_weights: {start}, which changes the base model in a way that loading "
            "does not repeat, so what it was trained on can't be had from model.name. Convert it where it was trained "
            "(peft: save_pretrained(..., path_initial_model_for_weight_conversion=...)), or merge it there and give "
            "the merged folder as model.name."
        )


def _fit_vocabulary(model: "PreTrainedModel", adapter: str | Path, stored: dict[str, Any], failed: str) -> None:
    """Room for tokens that were added in training, where the adapter brings the embeddings of all and their tokenizer.

    Every row of what is resized comes from the adapter then, which `_require_all` sees to.
    """
    own = int(model.get_input_embeddings().num_embeddings)
    embeddings = [name for name in stored if name.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight"))]
    rows = {int(stored[name].shape[0]) for name in embeddings}
    if not rows or rows == {own}:
        return
    wanted = max(rows)
    if len(rows) > 1 or not _tokens_prove(adapter, wanted):
        raise RequestError(
            f"{failed}: it holds embeddings of {wanted} tokens, the model has {own}, and no tokenizer of {wanted} "
            "tokens lies beside the adapter to say which they are. Resize the model first "
            f"(model.resize_token_embeddings({wanted}), saved with the tokenizer that was trained with), and give that "
            "folder as model.name."
        )
    model.resize_token_embeddings(wanted, mean_resizing=False)


def _tokens_prove(adapter: str | Path, rows: int) -> bool:
    from transformers import AutoTokenizer

    folder = Path(adapter)
    return (folder / "tokenizer_config.json").exists() and len(AutoTokenizer.from_pretrained(folder)) == rows


def _require_all(adapted: "PeftModel", stored: dict[str, Any], failed: str) -> None:
    """RequestError unless every stored tensor is in the model with its values, and every tensor of the adapter stored.

    stored: by the names of the adapter's file.
    """
    from peft import get_peft_model_state_dict

    placed = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    # Beside the adapter, embeddings are saved, and wrappers' own parts under names with the adapter's in them.
    whole = adapted.state_dict() | {name.replace(".default.", "."): t for name, t in adapted.state_dict().items()}
    found = whole | placed
    lost = [n for n, tensor in stored.items() if not _holds(found.get(n), tensor) and not _replaced(n, stored)]
    absent = sorted(placed.keys() - stored.keys())
    kinds = {"of its file without a place in the model": lost, "that its file lacks": absent}
    problems = "; ".join(listed(kind, names) for kind, names in kinds.items() if names)
    if problems:
        raise RequestError(
            f"{failed}: tensors {problems}. peft would leave these out or start them at random, so the reference "
            "would not be the adapter's model. Save it anew with the model's own save_pretrained, under the classes "
            "and names that it is loaded with."
        )


def _replaced(name: str, stored: dict[str, Any]) -> bool:
    """Whether it is of a module that the adapter brings another one for, so that it is not used."""
    return ".original_module." in name and name.replace(".original_module.", ".") in stored


def _holds(own: torch.Tensor | None, tensor: torch.Tensor) -> bool:
    return own is not None and own.shape == tensor.shape and torch.equal(own.cpu().to(tensor.dtype), tensor)


def _untie(adapted: "PeftModel") -> None:
    """Give the head weights of its own where an adapter lies on it, or on the embeddings that it shares them with.

    Merging into the shared tensor would change the other use too, which the adapter does not.
    """
    base = adapted.get_base_model()
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    layers = [getattr(module, "base_layer", module) for module in (embeddings, head)]
    if layers[0].weight is layers[1].weight and layers != [embeddings, head]:
        layers[1].weight = torch.nn.Parameter(layers[1].weight.detach().clone())
