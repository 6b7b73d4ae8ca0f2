"""The language model inside a multimodal one, as a model of its own."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from pipeline.errors import RequestError, RunFailed
from pipeline.model.opening import refuse_quantised, require_fitting, translated
from pipeline.model.proof import answers, require_same_answers


def open_text_part(
    source: str, config: PreTrainedConfig, *, revision: str | None, trust_remote_code: bool
) -> PreTrainedModel:
    """The text part of a folder or hub id, float32. config: of the whole.

    Raises RequestError where transformers has no such language model alone, or where that gives other log-probs for
    texts than the whole does, and as `opening.open_model`.
    """
    refuse_quantised(source, config)
    with translated(source):
        whole, found = AutoModelForImageTextToText.from_pretrained(
            source,
            revision=revision,
            trust_remote_code=trust_remote_code,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    require_fitting(Path(source), found)
    refused = f"{source}: the text part of {type(whole).__name__} can't be taken out of it"
    try:
        text: PreTrainedModel = AutoModelForCausalLM.from_config(config.get_text_config(), dtype=torch.float32)
        text.get_decoder().load_state_dict(whole.get_decoder().state_dict())
        text.get_output_embeddings().load_state_dict(whole.get_output_embeddings().state_dict())
        text.generation_config = whole.generation_config
        require_same_answers(text.eval(), answers(whole.eval()), refused)
    except (AttributeError, KeyError, RuntimeError, ValueError, RunFailed) as error:
        reason = " ".join(str(error).split())[:300]
        raise RequestError(f"{refused} ({reason}). Use a model of texts alone.") from None
    print(f"{source}: {type(whole).__name__}; its text part is taken, as {type(text).__name__}", file=sys.stderr)
    return text
