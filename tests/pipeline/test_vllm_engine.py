"""The real engine on a tiny random model: its numbers against transformers, its samples against the distribution."""

import numpy as np
import pytest

from pipeline.engine_process import EngineProcess
from pipeline.errors import RunFailed
from pipeline.params import ScoreParams
from pipeline.scoring_plan import EngineLength
from tests.pipeline.tiny_reference import (
    POSITIONS,
    adversarial_rows,
    quick_engine,
    transformers_token_logps,
    write_model,
)
from tests.tiny import EOS, VOCABULARY

pytestmark = pytest.mark.slow

LENGTH = EngineLength(POSITIONS + 1, beyond_limit=True)
PROMPTS = [np.array([3, 4, 5], np.int32), np.array([9], np.int32), np.array([7] * 130, np.int32)]


def ignore(rows, tokens=0):
    pass


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_engine():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(model, tmp_path_factory):
    params = ScoreParams(enforce_eager=True, max_num_batched_tokens=512)
    with EngineProcess(params, log=tmp_path_factory.mktemp("log") / "engine.log") as running:
        running.load(model, LENGTH)
        yield running


@pytest.fixture(scope="module")
def rows():
    return adversarial_rows()


@pytest.fixture(scope="module")
def expected(model, rows):
    return transformers_token_logps(model, rows)


@pytest.fixture(scope="module")
def scored(engine, rows):
    return engine.score(rows, ignore).logps


def test_every_log_prob_equals_transformers(rows, expected, scored):
    for (prompt, response), whole, found in zip(rows, expected, scored, strict=True):
        assert found.dtype == np.float32 and found.shape == response.shape
        # Of the P + R - 1 predictions, the response's are the last R.
        np.testing.assert_allclose(found, whole[len(prompt) - 1 :], atol=1e-4, err_msg=f"{len(prompt)}+{len(response)}")


@pytest.mark.parametrize("shift", [-1, 1])
def test_the_comparison_would_notice_a_shift_by_one(rows, expected, scored, shift):
    for (prompt, response), whole, found in zip(rows, expected, scored, strict=True):
        first = len(prompt) - 1 + shift
        if len(response) > 2 and first >= 0 and first + len(response) <= len(whole):
            assert np.abs(found - whole[first : first + len(response)]).max() > 0.1


def test_numbers_do_not_depend_on_what_else_is_in_the_call(engine, rows, scored):
    """Also after all other rows went through the engine: nothing is read from a cache of prefixes."""
    for index in (0, 9, 20, 25, 30):
        alone = engine.score([rows[index]], ignore).logps[0]
        np.testing.assert_allclose(alone, scored[index], atol=1e-5)
    again = engine.score(rows[::-1], ignore).logps[::-1]
    for first, second in zip(scored, again, strict=True):
        np.testing.assert_allclose(first, second, atol=1e-5)


def test_progress_adds_up(engine, rows):
    seen = []
    engine.score(rows, lambda *done: seen.append(done))
    assert sum(count for count, _ in seen) == len(rows)
    assert sum(tokens for _, tokens in seen) == sum(len(p) + len(r) for p, r in rows)


def sample(engine, prompts=PROMPTS, **changes):
    options = {"n": 4, "max_new_tokens": 12, "seed": 0, "stop_token_ids": []} | changes
    return engine.generate(prompts, ignore, **options)


def test_samples_are_as_many_and_as_long_as_asked(engine):
    found = sample(engine)
    assert [len(of_prompt) for of_prompt in found] == [4, 4, 4]
    answers = [answer for of_prompt in found for answer in of_prompt]
    # vLLM also stops at the end of sequence that the model's own config names.
    assert all(len(answer) == 12 or answer[-1] == EOS for answer in answers)
    assert all(EOS not in answer[:-1] for answer in answers)
    assert len({tuple(answer) for answer in answers}) == 12  # no two share their randomness


def test_a_seed_fixes_the_samples(engine):
    first = sample(engine)
    assert sample(engine) == first
    assert sample(engine, PROMPTS[:1])[0] == first[0]
    assert sample(engine, seed=1) != first


def test_prompts_that_overfill_one_engine_step_are_sampled_as_they_are_alone(engine):
    """Four of 200 tokens against a budget of 512; seeded requests must not be cut into chunks on CPU."""
    prompts = [np.full(200, 3 + index, np.int32) for index in range(4)]
    together = sample(engine, prompts, n=2)
    assert together[0] == sample(engine, prompts[:1], n=2)[0]


def test_a_stop_token_ends_an_answer_and_belongs_to_it(engine):
    stops = set(range(3, 20))
    free, stopped = sample(engine, max_new_tokens=40), sample(engine, max_new_tokens=40, stop_token_ids=sorted(stops))
    for whole, cut in zip((a for p in free for a in p), (a for p in stopped for a in p), strict=True):
        end = next((i for i, token in enumerate(whole) if token in stops), len(whole) - 1)
        assert cut == whole[: end + 1]


def test_samples_follow_the_models_whole_distribution(engine, model):
    """Temperature 1 and nothing cut off: KL estimates are wrong under any other sampling."""
    prompt, n = PROMPTS[0], 2000
    firsts = [answer[0] for answer in sample(engine, [prompt], n=n, max_new_tokens=1)[0]]
    every_token = [(prompt, np.array([token], np.int32)) for token in range(VOCABULARY)]
    probabilities = np.exp([logps[-1] for logps in transformers_token_logps(model, every_token)])
    counts = np.bincount(firsts, minlength=VOCABULARY)
    expected = n * probabilities
    common = expected >= 5
    statistic = ((counts - expected)[common] ** 2 / expected[common]).sum()
    assert statistic < common.sum() + 6 * np.sqrt(2 * common.sum())  # chi-squared: mean k, variance 2k
    tail = probabilities < 0.01
    assert abs(counts[tail].sum() - expected[tail].sum()) < 5 * np.sqrt(expected[tail].sum())


def test_a_model_that_vllm_cannot_load_is_a_failed_run_with_its_log(tmp_path, model):
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    log = tmp_path / "engine.log"
    with EngineProcess(ScoreParams(enforce_eager=True), log=log) as engine, pytest.raises(RunFailed) as failed:
        engine.load(tmp_path, LENGTH)
    assert "did not start" in str(failed.value) and str(log) in str(failed.value)
    assert "Traceback" in log.read_text()
