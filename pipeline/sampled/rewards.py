"""Scores of sampled answers by a reward model: a sequence-classification model with one class, in vLLM."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.engine.rows import engine_length
from pipeline.errors import RequestError
from pipeline.model.limits import model_limits
from pipeline.model.opening import open_config
from pipeline.model.tokenizer import open_tokenizer
from pipeline.params import ScoreParams
from pipeline.policies.answers import Answers, on_demand
from pipeline.reference.identity import reference_identity
from pipeline.sampled.scorers import Asked

_TURN = re.compile(r"(?:\A|\n\n)\[(system|developer|user|assistant|tool)\] ")


class Dialogue(NamedTuple):
    """A prompt as its text and ids; the ids prove that the text's turns were found rightly."""

    text: str
    ids: np.ndarray


def reward_scores(
    answers: Sequence[Asked],
    dialogues: Sequence[Dialogue],
    *,
    folder: Path,
    tokenizer: Any,
    engine: ScoreParams,
    trust_remote_code: bool = False,
) -> list[float]:
    """The reward model's logit of each answer to its dialogue, rendered by the reward model's own template.

    tokenizer: the reference's. Scores are journalled by token ids, so a killed run goes on where it was. Raises
    RequestError for a model with other than one class, a dialogue longer than its positions, and a prompt whose turns
    can't be told from its text.
    """
    limits = model_limits(folder, trust_remote_code=trust_remote_code)
    classes = int(open_config(folder, trust_remote_code=trust_remote_code).num_labels)
    if classes != 1:
        raise RequestError(
            f"sample.reward_model {folder} has {classes} classes, expected 1, whose logit is the reward. Name a reward "
            "model (AutoModelForSequenceClassification with num_labels 1), or wrap yours as sample.function."
        )
    rendered = _rendered(answers, dialogues, tokenizer, open_tokenizer(folder, trust_remote_code=trust_remote_code))
    longest = max(map(len, rendered), default=0)
    if limits.positions is not None and longest >= limits.positions:
        raise RequestError(
            f"sample.reward_model {folder} has {limits.positions} positions, and a prompt with its answer has "
            f"{longest} of its tokens. Lower sample.max_new_tokens or prepare.max_prompt_tokens, or name another one."
        )
    identity = reference_identity(folder, dtype=engine.dtype, quantization=engine.quantization)
    length = engine_length(longest, limits, engine, what="prompts with answers, as the reward model reads them,")
    with (
        on_demand(engine, folder, length, log="reward", trust_remote_code=trust_remote_code, classes=True) as ask,
        Answers(identity, "reward model", rows_per_call=engine.rows_per_call) as book,
    ):
        return book.scores(rendered, ask, "scores")


def _rendered(answers: Sequence[Asked], dialogues: Sequence[Dialogue], tokenizer: Any, own: Any) -> list[np.ndarray]:
    turns = {dialogue.text: turns_of(dialogue, tokenizer) for dialogue in dialogues}
    found = []
    for asked, dialogue in zip(answers, dialogues, strict=True):
        if own.chat_template is None:
            ids = own(dialogue.text + asked.text)["input_ids"]
        else:
            whole = [*turns[dialogue.text], {"role": "assistant", "content": asked.text}]
            ids = own(own.apply_chat_template(whole, tokenize=False), add_special_tokens=False)["input_ids"]
        found.append(np.array(ids, np.int32))
    return found


def turns_of(dialogue: Dialogue, tokenizer: Any) -> list[dict[str, str]]:
    """The messages of a prompt from its readable text, proved by rendering them with the reference's `tokenizer`."""
    alone = [{"role": "user", "content": dialogue.text}]
    if tokenizer.chat_template is None:
        return alone
    for turns in (alone, _headed(dialogue.text)):
        if turns:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            if tokenizer(text, add_special_tokens=False)["input_ids"] == dialogue.ids.tolist():
                return turns
    raise RequestError(
        "the turns of this prompt can't be told from its text, so a reward model can't be asked: "
        f"{dialogue.text[:200]!r}. Prompts with tool calls or template arguments, or that were cut to "
        "prepare.max_prompt_tokens, are such. Choose another sample.scorer, or leave these prompts out."
    )


def _headed(text: str) -> list[dict[str, str]]:
    """Turns under heads as data/tables.py's readable prompts have them; none where the text does not begin with one."""
    parts = _TURN.split(text)
    if parts[0]:
        return []
    return [{"role": role, "content": content} for role, content in zip(parts[1::2], parts[2::2], strict=True)]
