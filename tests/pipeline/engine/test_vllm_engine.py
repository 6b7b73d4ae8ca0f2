"""The real engine on a tiny random model: its numbers against transformers, its samples against the distribution."""

import numpy as np
import pytest

from pipeline.engine.probe import make_probe
from pipeline.engine.process import EngineProcess
from pipeline.engine.rows import EngineLength, Sampling
from pipeline.errors import EngineFailed, RunFailed
from pipeline.params import ScoreParams, SketchParams
from pipeline.sketches.head_plan import HeadPlan
from pipeline.sketches.sketcher import load_sketcher
from tests.tiny import EOS, POSITIONS, VOCABULARY, write_model
from tests.tiny_reference import adversarial_rows, quick_engine, transformers_token_logps

pytestmark = pytest.mark.slow

LENGTH = EngineLength(POSITIONS + 1, beyond_limit=True)
SKETCH = SketchParams(mode="tensorsketch", k=64, audit=32, seed=3)
PLAN = HeadPlan({"weight": "lm_head.weight"}, SKETCH.k, SKETCH.audit, SKETCH.seed)
PROMPTS = [np.array([3, 4, 5], np.int32), np.array([9], np.int32), np.array([7] * 130, np.int32)]


def ignore(rows, tokens=0):
    pass


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_engine():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"), tie_word_embeddings=False)


@pytest.fixture(scope="module")
def engine(model, tmp_path_factory):
    """As evaluate uses it: samples, and scores by prompt_logprobs."""
    params = ScoreParams(enforce_eager=True, max_num_batched_tokens=512)
    with EngineProcess(params, log=tmp_path_factory.mktemp("log") / "engine.log") as running:
        assert running.load(model, LENGTH, sampling=True) == "prompt_logprobs"
        yield running


@pytest.fixture(scope="module")
def probe(model):
    options = {"dtype": "float32", "quantization": None, "trust_remote_code": False}
    return make_probe(model, vocabulary=VOCABULARY, longest=POSITIONS, **options)


@pytest.fixture(scope="module")
def hidden_states_engine(model, probe, tmp_path_factory):
    """As score uses it on a CPU; able to sketch, which it does only where it is asked."""
    params = ScoreParams(enforce_eager=True, max_num_batched_tokens=512)
    with EngineProcess(params, log=tmp_path_factory.mktemp("log") / "engine.log") as running:
        assert running.load(model, LENGTH, probe=probe, plan=PLAN) == "hidden_states"
        yield running


@pytest.fixture(params=["prompt_logprobs", "hidden_states"])
def scorer(request):
    return request.getfixturevalue("engine" if request.param == "prompt_logprobs" else "hidden_states_engine")


@pytest.fixture(scope="module")
def rows():
    """Those of one prompt next to each other."""
    return sorted(adversarial_rows(), key=lambda row: row[0].tobytes())


@pytest.fixture(scope="module")
def expected(model, rows):
    return transformers_token_logps(model, rows)


@pytest.fixture(scope="module")
def scored(hidden_states_engine, rows):
    return hidden_states_engine.score(rows, ignore).logps


def test_every_log_prob_equals_transformers(rows, expected, scorer):
    for (prompt, response), whole, found in zip(rows, expected, scorer.score(rows, ignore).logps, strict=True):
        assert found.dtype == np.float32 and found.shape == response.shape
        # Of the P + R - 1 predictions, the response's are the last R.
        np.testing.assert_allclose(found, whole[len(prompt) - 1 :], atol=1e-4, err_msg=f"{len(prompt)}+{len(response)}")


def many_responses(seed=1):
    """One prompt of every length around a block, each with responses that begin alike for up to two blocks."""
    random = np.random.default_rng(seed)

    def draw(n):
        return random.integers(3, VOCABULARY, n).astype(np.int32)

    rows = []
    for length in (1, 31, 32, 33, 63, 64, 65, 95, 127, 128, 129):
        prompt, opening = draw(length), draw(70)
        answers = [opening[:n] for n in (1, 2, 31, 32, 33, 64, 65, 70)]
        answers += [np.concatenate([opening[:n], draw(5)]) for n in (1, 30, 40, 66)]
        answers += [draw(n) for n in (1, 40)]
        rows += [(prompt, answer) for answer in answers]
    return rows


@pytest.mark.parametrize("order", ["as it is", "longest first", "shuffled"])
def test_responses_that_share_prompt_and_opening_are_right_in_any_order(request, scorer, model, order):
    rows = many_responses()
    if order == "longest first":
        rows = sorted(rows, key=lambda row: (row[0].tobytes(), -len(row[1])))
    elif order == "shuffled":
        random = np.random.default_rng(2)
        rows = sorted([rows[i] for i in random.permutation(len(rows))], key=lambda row: row[0].tobytes())
    found = scorer.score(rows, ignore)
    for (prompt, response), whole, logps in zip(rows, transformers_token_logps(model, rows), found.logps, strict=True):
        np.testing.assert_allclose(logps, whole[len(prompt) - 1 :], atol=1e-4, err_msg=f"{len(prompt)}+{len(response)}")
    assert found.shared_tokens > 0.5 * sum(len(prompt) for prompt, _ in rows)
    if order == "longest first":  # as score does it; a prefix before its longer version costs rescoring
        # Hidden states at the ends of blocks are kept for siblings; log-probs there are of one sibling's token only.
        assert found.rescored <= (0 if scorer is request.getfixturevalue("hidden_states_engine") else len(rows) / 10)


@pytest.mark.parametrize("shift", [-1, 1])
def test_the_comparison_would_notice_a_shift_by_one(rows, expected, scored, shift):
    for (prompt, response), whole, found in zip(rows, expected, scored, strict=True):
        first = len(prompt) - 1 + shift
        if len(response) > 2 and first >= 0 and first + len(response) <= len(whole):
            assert np.abs(found - whole[first : first + len(response)]).max() > 0.1


def test_numbers_do_not_depend_on_what_else_is_in_the_call(scorer, rows, scored):
    """Also after all other rows went through the engine: nothing is read from a cache of prefixes."""
    for index in (0, 9, 20, 25, 30):
        alone = scorer.score([rows[index]], ignore).logps[0]
        np.testing.assert_allclose(alone, scored[index], atol=1e-5)
    again = scorer.score(rows[::-1], ignore).logps[::-1]
    for first, second in zip(scored, again, strict=True):
        np.testing.assert_allclose(first, second, atol=1e-5)


def test_one_pass_gives_log_probs_and_the_head_s_gradient_as_a_backward_has_it(hidden_states_engine, model, rows):
    """Also of responses whose beginning the engine skipped, since another one had computed it."""
    rows = sorted([*rows, *many_responses()], key=lambda row: (row[0].tobytes(), -len(row[1])))
    asked = [index % 3 > 0 for index in range(len(rows))]
    found, plain = hidden_states_engine.score(rows, ignore, sketched=asked), hidden_states_engine.score(rows, ignore)
    assert [sketch is not None for sketch in found.sketches] == asked and not any(plain.sketches)
    assert found.shared_tokens > 0 and found.rescored > plain.rescored  # a sketch can't be put together of two rows
    for first, second in zip(found.logps, plain.logps, strict=True):
        np.testing.assert_allclose(first, second, atol=1e-5)
    wanted = [(row, sketch) for row, sketch in zip(rows, found.sketches, strict=True) if sketch]
    with load_sketcher(model, SKETCH, "head") as sketcher:
        backward = sketcher([row for row, _ in wanted])
    for i, (row, sketch) in enumerate(wanted):
        whole = backward.values["head"][i].numpy(), backward.audit[i].numpy()
        for ours, theirs in zip((sketch.values, sketch.audit), whole, strict=True):
            assert np.linalg.norm(ours - theirs) < 1e-3 * np.linalg.norm(theirs), [len(part) for part in row]
        assert sketch.grad_norm == pytest.approx(backward.grad_norm[i].item(), rel=1e-3)


def test_progress_adds_up(scorer, rows):
    seen = []
    scorer.score(rows, lambda *done: seen.append(done))
    assert sum(count for count, _ in seen) == len(rows)
    assert sum(tokens for _, tokens in seen) == sum(len(p) + len(r) for p, r in rows)


def test_ranks_say_whether_each_token_is_the_likeliest(engine, model, rows):
    found = engine.ranked(rows, ignore)
    for (prompt, response), of_row in zip(rows, found, strict=True):
        logits = all_logits(model, [*prompt, *response])[len(prompt) - 1 : -1]
        own = logits[np.arange(len(response)), response]
        np.testing.assert_allclose(of_row[:, 0], own, atol=1e-4)
        clear = np.abs(logits - own[:, None]) > 1e-4  # ties but for rounding may go either way
        higher = (clear & (logits > own[:, None])).sum(axis=1)
        alike = (~clear).sum(axis=1)
        assert ((of_row[:, 1] > higher) & (of_row[:, 1] <= higher + alike)).all()


def test_greedy_answers_are_the_likeliest_tokens(engine, model):
    [[answer]] = sample(engine, PROMPTS[:1], n=1, temperature=0.0)
    expected = PROMPTS[0].tolist()
    for _ in answer:
        expected.append(int(all_logits(model, expected)[-1].argmax()))
    assert answer == expected[len(PROMPTS[0]) :]


def test_top_p_leaves_out_the_tail(engine, model):
    logps = np.sort(np.exp(all_logits(model, PROMPTS[0])[-1]))[::-1]
    kept = int((np.cumsum(logps) < 0.5).sum()) + 1
    firsts = {answer[0] for answer in sample(engine, PROMPTS[:1], n=300, max_new_tokens=1, top_p=0.5)[0]}
    likeliest = np.argsort(-all_logits(model, PROMPTS[0])[-1])[:kept]
    assert firsts <= set(likeliest.tolist()) and len(firsts) > kept // 2


def all_logits(model, ids):
    """Log-probs of every next token by transformers, (len(ids), vocabulary)."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        return loaded(torch.tensor([[int(i) for i in ids]])).logits[0].log_softmax(-1).numpy()


def sample(engine, prompts=PROMPTS, seed=0, **changes):
    sampling = Sampling(**{"n": 4, "max_new_tokens": 12} | changes)
    return engine.generate(prompts, ignore, sampling=sampling, seeds=sampling.seeds(seed, len(prompts)))


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
    free, stopped = (
        sample(engine, max_new_tokens=40),
        sample(engine, max_new_tokens=40, stop_token_ids=tuple(sorted(stops))),
    )
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


def test_a_backend_that_fails_the_probe_is_not_used_and_the_last_one_ends_the_run(tmp_path, model, probe, capsys):
    wrong = probe._replace(logps=[logps - 1 for logps in probe.logps])
    expected = pytest.raises(EngineFailed, match=r"prompt_logprobs that are up to 1 nats from transformers'")
    with EngineProcess(ScoreParams(enforce_eager=True), log=tmp_path / "engine.log") as engine, expected:
        engine.load(model, LENGTH, probe=wrong)
    assert "hidden_states is not used" in capsys.readouterr().err
