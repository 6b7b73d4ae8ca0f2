"""What was asked is kept by content, and asked once."""

import dataclasses

import numpy as np
import polars as pl
import pytest

from cache import CacheLocked, ReferenceIdentity, prompt_key, response_key
from pipeline.engine.process import Scored
from pipeline.engine.rows import Sampling
from pipeline.policies.answers import Answers, answer_rows

IDENTITY = ReferenceIdentity(
    weights="w", config="c", adapter=None, dtype="float32", quantization=None, engine="vllm", engine_version="0"
)


class Engine:
    """Answers by arithmetic on what it is asked, and remembers that."""

    def __init__(self):
        self.asked = []

    def score(self, rows, advance):
        self.asked += [("score", prompt.tolist(), response.tolist()) for prompt, response in rows]
        return Scored([-np.asarray(response, np.float32) / 8 for _, response in rows])

    def ranked(self, rows, advance):
        self.asked += [("rank", prompt.tolist(), response.tolist()) for prompt, response in rows]
        return [np.stack([-response / 8.0, response % 3], axis=1) for _, response in rows]

    def generate(self, prompts, advance, *, sampling, seeds):
        self.asked += [("draw", prompt.tolist(), seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        return [[[seed, i + 1] for i in range(sampling.n)] for seed in seeds]

    def classify(self, sequences, advance):
        self.asked += [("classify", ids.tolist()) for ids in sequences]
        return [np.array([ids.sum() / 4], np.float32) for ids in sequences]


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("REFCACHE_HOME", str(tmp_path))


def book(identity=IDENTITY, rows_per_call=2):
    return Answers(identity, "policy", rows_per_call=rows_per_call)


def rows(*pairs):
    return pl.DataFrame(
        {
            "response_key": [response_key(*pair) for pair in pairs],
            "prompt_key": [prompt_key(prompt) for prompt, _ in pairs],
            "prompt_ids": [prompt for prompt, _ in pairs],
            "response_ids": [response for _, response in pairs],
        },
        schema_overrides={"prompt_ids": pl.List(pl.Int32), "response_ids": pl.List(pl.Int32)},
    )


PAIRS = [([1, 2], [3]), ([1, 2], [4, 5]), ([6], [7, 7, 7])]


def never():
    pytest.fail("the engine was asked for")


def test_a_response_is_scored_once_even_where_it_comes_twice():
    engine = Engine()
    with book() as answers:
        found = answers.score(rows(*PAIRS, PAIRS[0]), lambda: engine, "rows")
        assert [found[response_key(*pair)] for pair in PAIRS] == [-3 / 8, -9 / 8, -21 / 8]
        assert sorted(asked[1:] for asked in engine.asked) == sorted(PAIRS)
    with book() as answers:
        assert answers.score(rows(*PAIRS), never, "rows") == found
        answers.score(rows(*PAIRS, ([8], [9])), lambda: engine, "rows")
    assert engine.asked[3:] == [("score", [8], [9])]


def test_ranks_say_whether_all_tokens_are_the_likeliest():
    engine = Engine()
    pairs = [([1], [4, 7]), ([1], [4, 6]), ([2], [5])]
    with book() as answers:
        answers.rank(rows(*pairs), lambda: engine, "continuations")
    with book() as answers:
        found = answers.rank(rows(*pairs), never, "continuations")
    assert [found[response_key(*pair)] for pair in pairs] == [(-11 / 8, True), (-10 / 8, False), (-5 / 8, False)]


PROMPTS = [np.array(ids, np.int32) for ids in ([1, 2], [3], [1, 2])]
SETTINGS = Sampling(2, 8, stop_token_ids=(2,))


def test_answers_are_drawn_once_for_a_prompt_settings_and_seed():
    engine = Engine()
    with book() as answers:
        found = answers.draw(PROMPTS, SETTINGS, [5, 6, 7], lambda: engine, "answers")
        assert found == [[[seed, 1], [seed, 2]] for seed in (5, 6, 7)]
    with book() as answers:
        assert answers.draw(PROMPTS, SETTINGS, [5, 6, 7], never, "answers") == found
        assert answers.draw(PROMPTS[1:2], SETTINGS, [6], never, "answers") == found[1:2]
        before = len(engine.asked)
        for other in (SETTINGS._replace(temperature=0.5), SETTINGS._replace(stop=("x",)), SETTINGS._replace(n=1)):
            answers.draw(PROMPTS, other, [5, 6, 7], lambda: engine, "answers")
        answers.draw(PROMPTS, SETTINGS, [8, 6, 7], lambda: engine, "answers")
    assert [asked[1:] for asked in engine.asked[before:]][-1] == ([1, 2], 8) and len(engine.asked) == before + 10


def test_greedy_answers_have_no_seed_and_a_question_that_comes_twice_is_asked_once():
    engine, greedy = Engine(), SETTINGS._replace(n=1, temperature=0.0)
    with book() as answers:
        found = answers.draw(PROMPTS, greedy, [5, 6, 7], lambda: engine, "answers")
        assert found[0] == found[2] and len(engine.asked) == 2
        assert answers.draw(PROMPTS, greedy, [50, 60, 70], never, "answers") == found


def test_scores_belong_to_a_sequence():
    engine, sequences = Engine(), [np.array(ids, np.int32) for ids in ([1], [2, 3], [1])]
    with book() as answers:
        assert answers.scores(sequences, lambda: engine, "scores") == [0.25, 1.25, 0.25]
        assert len(engine.asked) == 2
    with book() as answers:
        assert answers.scores(sequences, never, "scores") == [0.25, 1.25, 0.25]


def test_every_call_is_kept_before_the_next_is_made():
    class Dies(Engine):
        def score(self, rows, advance):
            if self.asked:
                raise KeyboardInterrupt
            return super().score(rows, advance)

    engine = Dies()
    with pytest.raises(KeyboardInterrupt), book() as answers:
        answers.score(rows(*PAIRS), lambda: engine, "rows")
    kept = {response_key(*pair) for _, *pair in engine.asked}
    with book() as answers:
        assert answers.sums().keys() == kept and 0 < len(kept) < len(PAIRS)


def test_models_that_differ_in_anything_share_nothing():
    with book() as answers:
        answers.score(rows(*PAIRS), Engine, "rows")
    for field in ("weights", "adapter", "dtype", "engine_version"):
        with book(dataclasses.replace(IDENTITY, **{field: "other"})) as other:
            assert other.sums() == {}


def test_two_processes_never_write_the_same_answers():
    with book(), pytest.raises(CacheLocked), book():
        pass


def test_answers_become_rows_behind_their_prompts():
    prompts = rows(*PAIRS).select("prompt_key", "prompt_ids").unique("prompt_key", maintain_order=True)
    found = answer_rows(prompts, [[[3], [4, 5]], [[7]]])
    assert found["prompt_ids"].to_list() == [[1, 2], [1, 2], [6]]
    assert found["response_key"].to_list() == [
        response_key(*pair) for pair in [([1, 2], [3]), ([1, 2], [4, 5]), ([6], [7])]
    ]
