"""What the demo study measures of drawn answers, against exact expectations over a model's next token."""

import shutil
from pathlib import Path

import polars as pl
import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel

from pipeline.data.demo import true_reward
from pipeline.data.tables import read_responses
from pipeline.evaluation.sampling import choose_prompts
from pipeline.model.tokenizer import open_tokenizer
from pipeline.params import EvaluateParams, Lora, LoraShape, PrepareParams
from pipeline.trainable.selection import select_trainable
from studies.measure import answers, pair_logps
from studies.measure.answers import Scale, ended, measure
from studies.measure.policies import load_model
from tests import ROOT
from tests.pipeline.data.preparing import prepare_into
from tests.tiny import write_model, write_reference_cache

pytestmark = pytest.mark.slow

PARAMS = ROOT / "studies" / "demo" / "params.yaml"
DEMO = PrepareParams.model_validate({"demo": {"prompts": 10, "sft_rows": 60}, "test_share": 0.5})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Prepared demo pairs, and two models for them, of varied answers: made / "0", made / "1"."""
    folder = tmp_path_factory.mktemp("demo")
    prepare_into(folder, DEMO)
    tokenizer = open_tokenizer(folder / "tokenizer")
    for seed in (0, 1):
        out = write_model(folder / str(seed), seed=seed, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
        model = load_model(out)
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(0.5)
        model.save_pretrained(out)
        shutil.copytree(folder / "tokenizer", out, dirs_exist_ok=True)
    return folder


def scale_of(made: Path, n: int, tokens: int) -> Scale:
    responses = read_responses(made / "pairs").filter(pl.col("split") == "test")
    settings = EvaluateParams(prompts=5, samples_per_prompt=n, max_new_tokens=tokens)
    tokenizer = open_tokenizer(made / "tokenizer")
    prompts = choose_prompts(responses, settings.prompts)
    return Scale(load_model(made / "0"), prompts, [tokenizer.eos_token_id], tokenizer, settings)


def test_expected_reward_and_kl_of_single_tokens_are_those_of_the_next_tokens_probabilities(made):
    n = 1500
    scale = scale_of(made, n, tokens=1)
    scale = scale._replace(reference=load_model(made / "1"), prompts=scale.prompts[:2])
    policy = load_model(made / "0")
    found = measure(policy, scale, "dpo", seed=3)
    assert found["prompt_key"].to_list() == scale.prompts["prompt_key"].to_list()
    texts = [scale.tokenizer.decode([token], skip_special_tokens=True) for token in range(policy.config.vocab_size)]
    largest = 0.0
    for row, prompt in zip(found.iter_rows(named=True), scale.prompts.iter_rows(named=True), strict=True):
        with torch.inference_mode():
            ids = torch.tensor([prompt["prompt_ids"]])
            ours, theirs = (m(ids).logits[0, -1].double().log_softmax(-1) for m in (policy, scale.reference))
        rewards = torch.tensor([true_reward(prompt["prompt_text"], text) for text in texts], dtype=torch.float64)
        mean = float((ours.exp() * rewards).sum())
        error = float((ours.exp() * (rewards - mean) ** 2).sum().sqrt()) / n**0.5
        assert row["reward"] == pytest.approx(mean, abs=5 * error + 1e-12)
        assert row["kl"] == pytest.approx(float((ours.exp() * (ours - theirs)).sum()), abs=1e-4)
        largest = max(largest, mean / (error + 1e-12))
    assert largest > 5  # so that a reward of nothing would have been noticed


def test_policies_of_one_seed_draw_alike_and_those_of_another_do_not(made):
    """So differences between policies are not drowned by the draws; batches that end early change nothing."""
    scale = scale_of(made, n=64, tokens=12)
    near = load_model(made / "0")
    with torch.no_grad():
        for parameter in near.parameters():
            parameter.mul_(1 + 1e-4 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    own, alike, other = (
        measure(model, scale, "dpo", seed) for model, seed in ((scale.reference, 0), (near, 0), (near, 1))
    )
    assert own["kl"].to_list() == [0.0] * 5
    paired, unpaired = (float((table["reward"] - own["reward"]).abs().sum()) for table in (alike, other))
    assert paired < unpaired / 10 and unpaired > 0.01


def test_a_batch_draws_alike_however_long_the_answers_before_it_were(made, monkeypatch):
    firsts = []

    def note(prompts, drawn, scale):
        firsts.append(drawn[:, 0].tolist())
        return [0.0] * len(prompts)

    monkeypatch.setattr(answers, "PROMPTS", 2)
    monkeypatch.setattr(answers, "true_rewards", note)
    scale = scale_of(made, n=8, tokens=10)
    measure(scale.reference, scale._replace(stop=[]), "dpo", 0)
    measure(scale.reference, scale._replace(stop=list(range(scale.reference.config.vocab_size))), "dpo", 0)
    assert len(firsts) == 6 and firsts[:3] == firsts[3:] and firsts[0] != firsts[1]


def test_an_answer_ends_with_its_first_end_of_turn():
    assert ended([5, 2, 7, 2], [2]) == [5, 2]
    assert ended([5, 7], [2]) == [5, 7]


def test_every_policy_and_the_reference_are_measured_adapters_too(made, tmp_path):
    """`dpo` is the reference's own weights, as an adapter that changes nothing; `bpo` is another model."""
    lora = select_trainable(load_model(made / "0"), Lora(lora=LoraShape(r=4, blocks="last")))
    assert isinstance(lora, PeftModel)
    lora.save_pretrained(tmp_path / "policies" / "dpo-0")
    shutil.copytree(made / "1", tmp_path / "policies" / "bpo-0")
    given = ["--params", PARAMS, "--set", "sweep.variants=[dpo, bpo]", "--set", "sweep.seeds=[0]"]
    given += ["--set", "evaluate.samples_per_prompt=3", "--set", "evaluate.max_new_tokens=5"]
    given += ["--pairs", made / "pairs", "--model", made / "0", "--policies", tmp_path / "policies"]
    drawn, sums = tmp_path / "answers.parquet", tmp_path / "sums.parquet"
    invoke(answers.command, *given, "--out", drawn)
    table = {str(name): part for (name,), part in pl.read_parquet(drawn).partition_by("variant", as_dict=True).items()}
    assert set(table) == {"reference", "dpo", "bpo"}
    columns = ["prompt_key", "seed", "split", "reward"]
    assert table["dpo"].select(columns).equals(table["reference"].select(columns))
    assert table["dpo"]["kl"].abs().max() < 1e-6 < 1e-2 < table["bpo"]["kl"].min()

    cache = write_reference_cache(tmp_path / "logps", made / "pairs", made / "0")
    invoke(pair_logps.command, *given, "--reference", cache, "--split", "test", "--out", sums)
    moved = pl.read_parquet(sums).with_columns((pl.col("chosen") - pl.col("ref_chosen")).abs().alias("moved"))
    largest = dict(moved.group_by("variant").agg(pl.col("moved").max()).iter_rows())
    assert largest["reference"] == largest["dpo"] < 1e-3 < 1 < largest["bpo"]


def invoke(command, *words) -> None:
    assert CliRunner().invoke(command, [str(word) for word in words], catch_exceptions=False).exit_code == 0
