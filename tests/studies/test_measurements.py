"""What the studies measure of a policy, against plain logits and the definition of the divergence."""

import itertools
import math
import shutil

import polars as pl
import pytest
import torch
from click.testing import CliRunner

from pipeline.data.tables import read_pairs, read_responses
from pipeline.forward.logps import ResponseLogps
from pipeline.params import load_params
from studies.measure import divergence, pair_logps
from studies.measure.divergence import Prompts, answer_divergences, draw_answers, pad_left
from studies.measure.pair_logps import response_sums
from studies.measure.policies import load_model
from studies.sweeps import cost as sweep_cost
from tests import ROOT
from tests.tiny import EOS, VOCABULARY, plain_logps, write_model, write_pairs, write_reference_cache

PARAMS = ROOT / "studies" / "dynamics" / "params.yaml"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [write_model(folder / str(seed), seed=seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def loaded(models):
    return [load_model(folder) for folder in models]


def test_response_sums_are_the_sums_of_plain_log_probs(models, tmp_path):
    responses = read_responses(write_pairs(tmp_path, 5))
    found = response_sums(models[0], responses)
    for key, prompt, response in responses.select("response_key", "prompt_ids", "response_ids").iter_rows():
        assert found[key] == pytest.approx(math.fsum(plain_logps(models[0], prompt, response)), abs=1e-3)
    assert len(found) == len(responses)


def test_every_policy_is_measured_on_every_pair_against_the_reference_cache(models, tmp_path):
    pairs = write_pairs(tmp_path / "pairs", 8)
    cache = write_reference_cache(tmp_path / "logps", pairs, models[0])
    for name, model in (("dpo-0", models[0]), ("bpo-0", models[1])):
        shutil.copytree(model, tmp_path / "policies" / name)
    given = ["--params", PARAMS, "--set", "sweep.variants=[dpo, bpo]", "--set", "sweep.seeds=[0]"]
    given += ["--set", "evaluate.prompts=3", "--set", "evaluate.max_new_tokens=5"]
    given += ["--pairs", pairs, "--model", models[0], "--policies", tmp_path / "policies"]
    sums, kl = tmp_path / "sums.parquet", tmp_path / "kl.parquet"
    invoke(pair_logps.command, *given, "--reference", cache, "--split", "train", "--split", "test", "--out", sums)
    table = pl.read_parquet(sums)
    assert table.group_by("variant").len().sort("variant").rows() == [("bpo", 16), ("dpo", 16), ("reference", 16)]
    moved = table.with_columns((pl.col("chosen") - pl.col("ref_chosen")).abs().alias("moved"))
    largest = dict(moved.group_by("variant").agg(pl.col("moved").max()).iter_rows())
    assert largest["reference"] == largest["dpo"] < 1e-3 < 1 < largest["bpo"]  # `dpo` is the reference's own weights

    invoke(divergence.command, *given, "--out", kl)
    found = pl.read_parquet(kl)
    assert found.group_by("variant", "split").len().sort("variant", "split")["len"].to_list() == [2, 3, 2, 3]
    assert found.filter(pl.col("variant") == "dpo")["kl"].abs().max() < 1e-6
    assert found.filter(pl.col("variant") == "bpo")["kl"].min() > 1e-3


def test_the_reference_is_forwarded_on_every_batch_of_a_cell_with_prompts_shared(models, tmp_path, monkeypatch):
    """Two epochs in batches of all pairs: every prompt and response twice, whatever the order."""
    pairs = write_pairs(tmp_path, 6, test_share=0.0)
    responses = read_responses(pairs)
    tables = (responses.unique("prompt_key")["prompt_ids"], responses["response_ids"])
    distinct = sum(int(ids.list.len().sum()) for ids in tables)
    seen, forward = [], ResponseLogps.forward
    monkeypatch.setattr(ResponseLogps, "forward", lambda *given: seen.append(given[1].numel()) or forward(*given))
    whole = {"train.epochs": 2.0, "train.batch_size": len(read_pairs(pairs)), "train.tokens_per_batch": 100_000}
    params = load_params(PARAMS, [f"{name}={value}" for name, value in whole.items()])
    cost = sweep_cost.online_reference(params, pairs, models[0], 0)
    assert seen == [distinct, distinct] and cost["wall"] > 0


def invoke(command, *words) -> None:
    assert CliRunner().invoke(command, [str(word) for word in words], catch_exceptions=False).exit_code == 0


def test_divergence_of_a_model_from_itself_is_zero(loaded):
    prompts = pad_left([[5, 6], [7]])
    answers = torch.tensor([[3, 4, EOS], [8, 9, 10]])
    assert answer_divergences(loaded[0], loaded[0], prompts, answers, [EOS]).tolist() == [0.0, 0.0]


def test_divergence_sums_over_the_answer_and_not_beyond_its_end(loaded):
    policy, reference = loaded
    prompt, answer = [5, 6, 7], [3, EOS]
    with torch.inference_mode():
        ours, theirs = (m(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1) for m in loaded)
        expected = sum(float((ours[p].exp() * (ours[p] - theirs[p])).sum()) for p in (2, 3))
        padded = pad_left([prompt, [9] * 8])
        answers = torch.tensor([[*answer, 11, 12], [13] * 4])
        found = answer_divergences(policy, reference, padded, answers, [EOS])
    assert float(found[0]) == pytest.approx(expected, abs=1e-4)


def test_expected_divergence_is_that_of_whole_answers(loaded):
    """Over all answers of two tokens, weighted by the policy: E[sum of next-token KLs] = KL of the joint."""
    policy, reference = loaded
    answers = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=2)))
    prompts = Prompts(*(part.repeat(len(answers), 1) for part in pad_left([[5, 6]])))
    with torch.inference_mode():
        logps = []
        for model in loaded:
            step = model(torch.cat([prompts.ids, answers], dim=1)).logits.double().log_softmax(-1)
            logps.append(step[:, 1:-1].gather(2, answers[..., None])[..., 0].sum(dim=1))
        # No token ends an answer here, so that all have two tokens.
        found = answer_divergences(policy, reference, prompts, answers, [])
    weights = logps[0].exp()
    assert float(weights.sum()) == pytest.approx(1, abs=1e-6)
    assert float((weights * found).sum()) == pytest.approx(float((weights * (logps[0] - logps[1])).sum()), rel=1e-5)


def test_drawn_answers_follow_the_policy_whatever_the_padding(loaded):
    """Shares of many answers' first tokens are the policy's probabilities, also beside a longer prompt."""
    torch.manual_seed(0)
    n, prompt = 4000, [5, 6]
    with torch.inference_mode():
        expected = loaded[0](torch.tensor([prompt])).logits[0, -1].softmax(-1)
        answers = draw_answers(loaded[0], pad_left([prompt] * n + [[7] * 9]), [EOS], 1)
        shares = torch.bincount(answers[:n, 0], minlength=VOCABULARY) / n
    assert float((shares - expected).abs().max()) < 5 * 0.5 / math.sqrt(n)
    assert pl.Series(answers[:, 0].tolist()).n_unique() > 1
