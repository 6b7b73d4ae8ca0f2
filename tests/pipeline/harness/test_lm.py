"""PolicyLM without an engine: transformers answers in its place, beside the harness's own `hf` on the same requests."""

import numpy as np
import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from pipeline.errors import RequestError
from pipeline.harness.lm import Lengths, PolicyLM
from pipeline.model.tokenizer import open_tokenizer
from tests.pipeline.harness.small_tasks import write_chat_model
from tests.tiny_reference import transformers_token_logps

POSITIONS = 60
LONG = "The capital of France is Paris. A traveller went from Oslo to Rome. " * 6


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_chat_model(tmp_path_factory.mktemp("model"), positions=POSITIONS)


@pytest.fixture(scope="module")
def tokenizer(model):
    return open_tokenizer(model)


class Transformers(Lengths):
    """Scores rows with all logits; keeps what was drawn."""

    def __init__(self, model):
        super().__init__()
        self.model, self.drawn = model, []

    def rank(self, rows):
        super().rank(rows)
        logps = transformers_token_logps(self.model, rows)
        return [(float(of[len(prompt) - 1 :].sum()), False) for of, (prompt, _) in zip(logps, rows, strict=True)]

    def draw(self, prompts, sampling, seeds):
        self.drawn += [(prompt.tolist(), sampling, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        return super().draw(prompts, sampling, seeds)


@pytest.fixture
def policy(model, tokenizer):
    def make(max_length=40, **changes):
        asked = Transformers(model)
        options = {"positions": POSITIONS, "stop_token_ids": [7], "seed": 0} | changes
        return PolicyLM(tokenizer, asked, max_length=max_length, **options), asked

    return make


def of_hf(model, tokenizer, max_length):
    return HFLM(str(model), tokenizer=tokenizer, device="cpu", dtype="float32", max_length=max_length)


def request(kind, *arguments):
    return Instance(kind, {}, arguments, 0, ("small", 0, 1))


def test_rolling_and_conditional_log_likelihoods_are_those_of_hf(model, tokenizer, policy):
    lm, _ = policy()
    texts = [request("loglikelihood_rolling", text) for text in (LONG, "Oslo", LONG[:200])]
    theirs = of_hf(model, tokenizer, 40)
    assert lm.loglikelihood_rolling(texts) == pytest.approx(
        theirs.loglikelihood_rolling(texts, disable_tqdm=True), abs=1e-3
    )
    pairs = [("", " Paris"), ("The capital ", "of France"), (LONG, " Rome"), ("<|end|>The", " capital"), ("  ", "Oslo")]
    pairs = [request("loglikelihood", *pair) for pair in pairs[:4]]
    expected = [logp for logp, _ in theirs.loglikelihood(pairs, disable_tqdm=True)]
    assert [logp for logp, _ in lm.loglikelihood(pairs)] == pytest.approx(expected, abs=1e-3)


def test_a_context_as_long_as_the_model_loses_one_token_more_than_in_hf(policy):
    """The engine feeds the last token too, and has no position for one more."""
    lm, asked = policy(max_length=POSITIONS)
    lm.loglikelihood([request("loglikelihood", LONG, " Rome")])
    assert asked.longest == POSITIONS
    lm, asked = policy(max_length=POSITIONS - 1)
    lm.loglikelihood([request("loglikelihood", LONG, " Rome")])
    assert asked.longest == POSITIONS


def test_contexts_leave_room_for_the_answer_and_lose_their_beginning(policy, tokenizer):
    lm, asked = policy()
    lm.generate_until([request("generate_until", LONG, {"until": ["Q"], "max_gen_toks": 15})])
    [(prompt, sampling, _)] = asked.drawn
    assert prompt == tokenizer.encode(LONG)[-25:]
    assert (sampling.n, sampling.max_new_tokens, sampling.temperature, sampling.stop_token_ids[0]) == (1, 15, 0.0, 1)


def test_a_special_token_among_stop_strings_is_told_as_a_token(policy, tokenizer):
    lm, asked = policy()
    until = ["Q", "<|user|>", ""]
    lm.generate_until([request("generate_until", "A", {"until": until, "max_gen_toks": 5})])
    sampling = asked.drawn[0][1]
    ids = {7, tokenizer.convert_tokens_to_ids("<|user|>"), tokenizer.eos_token_id}
    assert sampling.stop == ("Q",) and set(sampling.stop_token_ids) == ids


def test_texts_have_no_special_tokens_and_end_before_the_first_stop_string(policy, tokenizer):
    lm, asked = policy()
    drawn = tokenizer.encode("<|user|>Paris Rome of Oslo<|end|>")
    asked.draw = lambda prompts, *_: [drawn for _ in prompts]
    options = {"max_gen_toks": 5}
    requests = [request("generate_until", "A", options | {"until": until}) for until in ([], ["Oslo", " Rome"], [])]
    assert lm.generate_until(requests) == ["Paris Rome of Oslo", "Paris", "Paris Rome of Oslo"]


def test_repeats_of_a_sampled_prompt_have_seeds_of_their_own_that_other_tasks_leave_alone(policy):
    options = {"until": ["Q"], "do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_gen_toks": 5}
    twice = [request("generate_until", "A", options)] * 2
    lm, asked = policy()
    lm.generate_until(twice)
    other, after = policy()
    other.generate_until([request("generate_until", "B", options), *twice])
    assert len({seed for *_, seed in asked.drawn}) == 2
    assert [seed for *_, seed in asked.drawn] == [seed for *_, seed in after.drawn][1:]
    assert (asked.drawn[0][1].temperature, asked.drawn[0][1].top_p) == (0.7, 0.9)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"until": [], "max_gen_toks": 40}, r"up to 40 tokens.*room for 40.*evaluate\.max_length.*include"),
        (
            {"until": [], "do_sample": True, "temperature": 1.0, "top_k": 5, "max_gen_toks": 5},
            "small has.* top_k, which",
        ),
        ({"until": [], "num_beams": 4, "max_gen_toks": 5}, "small has generation_kwargs num_beams"),
    ],
)
def test_what_the_engine_cannot_be_asked_is_refused(policy, options, expected):
    lm, _ = policy()
    with pytest.raises(RequestError, match=expected):
        lm.generate_until([request("generate_until", "A", options)])


def test_greedy_answers_take_settings_that_do_not_concern_them(policy):
    lm, asked = policy()
    options = {"until": [], "do_sample": False, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "num_beams": 1}
    lm.generate_until([request("generate_until", "A", options | {"max_gen_toks": 5})])
    assert (asked.drawn[0][1].temperature, asked.drawn[0][1].top_p) == (0.0, 1.0)


def test_an_answer_without_room_for_a_token_before_it_is_refused(policy):
    lm, _ = policy()
    with pytest.raises(RequestError, match=r"answer of \d+ tokens to be scored, and 41 tokens fit"):
        lm.loglikelihood([request("loglikelihood", "A", LONG)])


def test_a_template_that_refuses_a_system_turn_gets_none(policy, tokenizer):
    lm, _ = policy()
    turns = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    assert lm.apply_chat_template(turns) == "<|system|>be kind<|user|>hi<|assistant|>"
    before = tokenizer.chat_template
    try:
        tokenizer.chat_template = before.replace("'system', ", "")
        assert lm.apply_chat_template(turns) == "<|user|>hi<|assistant|>"
    finally:
        tokenizer.chat_template = before


def test_lengths_count_prompt_and_answer():
    lengths = Lengths()
    lengths.rank([(np.array([1, 9], np.int32), np.array([3], np.int32))])
    assert (lengths.longest, lengths.largest_id, lengths.draws) == (3, 9, False)
