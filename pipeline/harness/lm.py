"""One model as lm-evaluation-harness sees it: texts in, log-likelihoods and answers out, each asked of it once.

Tokens, truncation and stop strings are those of the harness's own `hf` model with batch size 1, so that scores are
comparable with its. Imports lm_eval: modules import this one when they need it.
"""

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import polars as pl
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from cache import prompt_key, response_key
from pipeline.engine.rows import Row, Sampling
from pipeline.errors import RequestError
from pipeline.policies.answers import Answers, Ask

MAX_GEN_TOKS = 256  # where a task names none, as the harness's `hf`
# Of generation_kwargs: what changes nothing, and what greedy answers don't depend on.
_NEUTRAL: dict[str, Any] = {"num_beams": 1, "repetition_penalty": 1.0, "num_return_sequences": 1, "use_cache": True}
_OF_SAMPLING = {"top_p", "top_k", "min_p"}


class Asked(Protocol):
    """Whom PolicyLM asks."""

    def rank(self, rows: Sequence[Row]) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives it) of each row's response."""

    def draw(self, prompts: Sequence[np.ndarray], sampling: Sampling, seeds: Sequence[int]) -> list[list[int]]:
        """One answer a prompt as token ids."""


class Model:
    """A model through its journals."""

    def __init__(self, answers: Answers, ask: Ask) -> None:
        self._answers, self._ask = answers, ask

    def rank(self, rows: Sequence[Row]) -> list[tuple[float, bool]]:
        keys = [response_key(prompt, response) for prompt, response in rows]
        frame = pl.DataFrame(
            {
                "response_key": pl.Series(keys, dtype=pl.Binary),
                "prompt_key": pl.Series([prompt_key(prompt) for prompt, _ in rows], dtype=pl.Binary),
                "prompt_ids": pl.Series([prompt.tolist() for prompt, _ in rows], dtype=pl.List(pl.Int32)),
                "response_ids": pl.Series([response.tolist() for _, response in rows], dtype=pl.List(pl.Int32)),
            }
        )
        found = self._answers.rank(frame, self._ask, "choices of tasks")
        return [(found[key].logp, found[key].greedy) for key in keys]

    def draw(self, prompts: Sequence[np.ndarray], sampling: Sampling, seeds: Sequence[int]) -> list[list[int]]:
        answers = self._answers.draw(prompts, sampling, seeds, self._ask, "answers to tasks")
        return [of_prompt[0] for of_prompt in answers]


class Lengths:
    """Asks nobody, and notes what would be asked: longest in tokens with the answer, largest token id, texts or not."""

    def __init__(self) -> None:
        self.longest, self.largest_id, self.draws = 0, 0, False

    def rank(self, rows: Sequence[Row]) -> list[tuple[float, bool]]:
        for prompt, response in rows:
            self.longest = max(self.longest, len(prompt) + len(response))
            self.largest_id = max(self.largest_id, int(prompt.max()), int(response.max()))
        return [(0.0, False)] * len(rows)

    def draw(self, prompts: Sequence[np.ndarray], sampling: Sampling, seeds: Sequence[int]) -> list[list[int]]:
        self.draws = True
        for prompt in prompts:
            self.longest = max(self.longest, len(prompt) + sampling.max_new_tokens)
            self.largest_id = max(self.largest_id, int(prompt.max()))
        return [[] for _ in prompts]


class _Wanted(NamedTuple):
    """What generation_kwargs come to. until: where the answer's text is cut."""

    sampling: Sampling
    until: list[str]


class PolicyLM(TemplateLM):  # type: ignore[misc]  # lm_eval has no types
    """asked: whom. max_length: tokens of context and answer. positions: of the model, None where nothing bounds it.

    stop_token_ids end every answer, beside the stop strings of its task. seed: of tasks that sample.
    """

    def __init__(
        self,
        tokenizer: Any,
        asked: Asked,
        *,
        max_length: int,
        positions: int | None,
        stop_token_ids: Sequence[int],
        seed: int,
    ) -> None:
        super().__init__()
        self.tokenizer, self.max_length = tokenizer, max_length
        self._asked, self._stop_token_ids, self._seed = asked, tuple(stop_token_ids), seed
        # The last token is never fed, so `hf` scores one more than the model has positions. The engine feeds it.
        self._scored_length = max_length + 1 if positions is None else min(max_length + 1, positions)
        self._special = {str(token): id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._encoded: dict[tuple[str, bool | None], np.ndarray] = {}

    def asking(self, asked: Asked) -> Self:
        """The same, asking another; they share what was encoded."""
        other = copy.copy(self)
        other._asked = asked
        return other

    # tokens and texts, as in `hf` -------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int | None:
        id: int | None = self.tokenizer.eos_token_id
        return id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        id: int | None = self.eot_token_id if bos is None else bos
        if id is None:
            raise RequestError(
                "A task has an empty context, which stands for the tokenizer's bos or eos token, and it has neither. "
                "Name one in tokenizer_config.json, or leave the task out of evaluate.tasks."
            )
        return id

    @property
    def tokenizer_name(self) -> str:
        name: str = self.tokenizer.name_or_path.replace("/", "__")
        return name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """None: the tokenizer's special tokens, unless the text begins with the first of them already."""
        found = self._encoded.get((string, add_special_tokens))
        if found is None:
            special = add_special_tokens
            if special is None and self._begins_with_prefix(string):
                special = False
            options = {} if special is None else {"add_special_tokens": special}
            found = np.array(self.tokenizer.encode(string, **options), dtype=np.int32)
            self._encoded[string, add_special_tokens] = found
        ids: list[int] = found.tolist()
        return ids

    def _begins_with_prefix(self, string: str) -> bool:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        prefix = eos if bos is None else bos
        return prefix is not None and string.startswith(self.tokenizer.decode(prefix))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        from jinja2.exceptions import TemplateError

        options = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            text: str = self.tokenizer.apply_chat_template(chat_history, **options)
        except TemplateError:  # a template without a system role
            turns = [turn for turn in chat_history if turn["role"] != "system"]
            text = self.tokenizer.apply_chat_template(turns, **options)
        return text

    # log-likelihoods --------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        return self._asked.rank([self._row(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        rows: list[Row] = []
        ends = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._scored_length - 1,
                context_len=1,
            )
            rows += [self._row(*make_disjoint_window(window)) for window in windows]
            ends.append(len(rows))
        logps = [logp for logp, _ in self._asked.rank(rows)]
        return [sum(logps[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def _row(self, context: list[int], continuation: list[int]) -> Row:
        """The last tokens of both that fit: (context, continuation)."""
        if not continuation:
            raise RequestError("A task has an answer without a token, which has no log-likelihood.")
        kept = self._scored_length - len(continuation)
        if kept < 1:
            raise RequestError(
                f"A task has an answer of {len(continuation)} tokens to be scored, and {self._scored_length} tokens "
                "fit with a token before it. Raise evaluate.max_length where the model has the positions, or leave "
                "the task out."
            )
        return np.array(context[-kept:] or [self.prefix_token_id], np.int32), np.array(continuation, np.int32)

    # texts ------------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(index)
        texts = [""] * len(requests)
        for indices in groups.values():
            of_group = [requests[index] for index in indices]
            wanted = self._wanted(of_group[0].args[1], of_group[0].task_name)
            prompts = [self._prompt(request.args[0], wanted.sampling) for request in of_group]
            answers = self._asked.draw(prompts, wanted.sampling, self._seeds(prompts))
            for index, answer in zip(indices, answers, strict=True):
                text = self.tokenizer.decode(answer, skip_special_tokens=True)
                texts[index] = postprocess_generated_text(text, wanted.until, None)
        return texts

    def _prompt(self, context: str, sampling: Sampling) -> np.ndarray:
        ids = self.tok_encode(context)[-(self.max_length - sampling.max_new_tokens) :]
        return np.array(ids or [self.prefix_token_id], np.int32)

    def _wanted(self, options: dict[str, Any], task: str) -> _Wanted:
        options = normalize_gen_kwargs(options, MAX_GEN_TOKS)
        eos = None if self.eot_token_id is None else self.tokenizer.decode(self.eot_token_id)
        until = handle_stop_sequences(options.pop("until"), eos=eos)
        tokens, sampled = options.pop("max_gen_toks"), options.pop("do_sample")
        stated = options.pop("temperature", 1.0)
        temperature = stated if sampled else 0.0
        if tokens >= self.max_length:
            raise RequestError(
                f"{task} wants answers of up to {tokens} tokens, but context and answer together have room for "
                f"{self.max_length}, so nothing of the question would be left. Raise evaluate.max_length where the "
                f"model has the positions, or write a YAML file with `include:` of the task's own and "
                f"generation_kwargs.max_gen_toks below {self.max_length}, and name that file in evaluate.tasks."
            )
        odd = sorted(name for name, value in options.items() if name != "top_p" and _NEUTRAL.get(name) != value)
        if odd := [name for name in odd if temperature > 0 or name not in _OF_SAMPLING]:
            raise RequestError(
                f"{task} has generation_kwargs {', '.join(odd)}, which can't be asked of the engine here (until, "
                "max_gen_toks, do_sample, temperature and top_p can). Leave the task out of evaluate.tasks."
            )
        # `hf` stops at a special token's text too; an engine's text has none, so it is told the token.
        ids = {*self._stop_token_ids, *(self._special[text] for text in until if text in self._special)}
        sampling = Sampling(
            1,
            tokens,
            temperature=temperature,
            top_p=options.get("top_p", 1.0) if temperature > 0 else 1.0,
            stop_token_ids=tuple(sorted(ids)),
            stop=tuple(text for text in until if text and text not in self._special),
        )
        return _Wanted(sampling, until)

    def _seeds(self, prompts: Sequence[np.ndarray]) -> list[int]:
        """Of each prompt's own digest, so that they stay when tasks come or go; another for each repeat."""
        seen: Counter[int] = Counter()
        seeds = []
        for prompt in prompts:
            own = int.from_bytes(hashlib.blake2b(prompt.astype("<i4").tobytes(), digest_size=4).digest())
            seeds.append(self._seed * 1_000_003 + own + seen[own])
            seen[own] += 1
        return seeds
