"""params.yaml: every mistake is one message that names file, key, value and what is allowed."""

import pytest
from click.testing import CliRunner

from pipeline.errors import RequestError
from pipeline.params import load_params
from stages.__main__ import main
from tests import ROOT

DEFAULT = ROOT / "params.yaml"


def test_default_and_presets_are_complete_and_valid():
    for file in [DEFAULT, *sorted((ROOT / "presets").glob("*.yaml"))]:
        load_params(file)


def test_set_overrides_one_value_and_reads_yaml():
    params = load_params(DEFAULT, ["train.learning_rate=3e-6", "sweep.seeds=[1, 2]", "train.variants.dpo.beta=0.2"])
    assert params.train.learning_rate == 3e-6
    assert params.sweep.seeds == [1, 2]
    assert params.train.variants["dpo"].beta == 0.2


def test_benchmark_tasks_are_off_unless_named():
    evaluate = load_params(DEFAULT).evaluate
    assert (evaluate.tasks, evaluate.task_data, evaluate.limit, evaluate.fewshot) == ([], None, None, None)
    assert evaluate.max_length is None and evaluate.apply_chat_template
    named = ["evaluate.tasks=[gsm8k_cot_4shot, tasks/own]", "evaluate.limit=5", "evaluate.fewshot=0"]
    named += ["evaluate.task_data=data/tasks", "evaluate.max_length=4096", "evaluate.apply_chat_template=false"]
    assert load_params(DEFAULT, named).evaluate.tasks == ["gsm8k_cot_4shot", "tasks/own"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.learning_rat=1", ["train.learning_rat", "unknown key"]),
        ("train.learning_rate=fast", ["train.learning_rate", "valid number", "'fast'"]),
        ("train.learning_rate=-1", ["train.learning_rate", "greater than 0", "-1"]),
        (
            "score={tensor_parallel_size: 2, ray: {gpus: 1}}",
            ["score", "ray.gpus is 1", "tensor_parallel_size", "found 2"],
        ),
        ("train.zero_stage=5", ["train.zero_stage", "0, 1, 2 or 3", "5"]),
        ("train.variants={dpo_b0.2: {objective: dpo}}", ["'dpo_b0.2'", "letters, digits and underscores"]),
        ("train.variants={dpo-1: {objective: dpo}}", ["'dpo-1'", "letters, digits and underscores"]),
        ("train.variants={dpo: {objective: dpo}, DPO: {objective: dpo}}", ["'dpo' and 'DPO'", "one folder"]),
        ("sweep.variants=[dpo, dpo]", ["sweep.variants", "['dpo'] stand there more than once"]),
        ("sweep.seeds=[0, 1, 0]", ["sweep.seeds", "[0] stand there more than once"]),
        ("train.variants.dpo.mixture=0.5", ["train.variants.dpo", "mixture", "unknown key"]),
        ("train.variants.bdpo.mixture=1.0", ["train.variants.bdpo", "mixture", "must lie in (0, 1), found 1"]),
        ("train.variants.bdpo.beta=.inf", ["train.variants.bdpo", "beta", "finite", "inf"]),
        (
            "train.variants.dpo={objective: bpo, alpha: 0}",
            ["train.variants.dpo", "alpha", "must lie in (0, 1], found 0"],
        ),
        ("train.variants.dpo={objective: bpo, link: probit}", ["link", "'logistic' or 'hinge'", "probit"]),
        ("train.variants.dpo={objective: ipo, betta: 1}", ["unknown key betta", "ipo has beta, divergence"]),
        ("train.variants.dpo={objective: exo_pair, label_smoothing: 0.0}", ["must lie in (0, 0.5), found 0"]),
        ("train.variants.dpo={objective: auxdpo}", ["sweep.variants", "['dpo']", "sketch.mode", "found none"]),
        ("train.variants.dpo={objective: auxdpo, null_weight: 0.0}", ["null_weight", "must lie in (0, ", "found 0"]),
        (
            "train.variants.dpo={objective: auxdpo, null_weight: 20.0, null_weight_absolute: 1.0}",
            ["null_weight 20.0 and null_weight_absolute 1.0", "expected one of them"],
        ),
        ("train.variants.dpo={objective: auxdpo, null_weight_absolute: 0.0}", ["null_weight_absolute", "(0, "]),
        ("train.variants.dpo={objective: auxdpo, ridge: -1.0}", ["ridge", "must lie in [0, ", "found -1"]),
        ("train.variants.dpo={objective: auxdpo, constraint: hard}", ["'penalty', 'projection' or 'batch'", "hard"]),
        ("train.variants.dpo={objective: auxdpo, rank: 0}", ["rank", "greater than or equal to 1"]),
        ("train.variants.dpo={objective: auxdpo, weights: pairs}", ["weights", "'responses' or 'sides'"]),
        ("train.variants.dpo={objective: weighted_sum, terms: [{loss: {objective: auxdpo}}]}", ["auxdpo", "'bdpo'"]),
        ("train.variants.dpo={objective: aot, settings: {micro_batch_size: 8}}", ["aot", "one micro-batch", "found"]),
        ("train.variants.dpo={objective: aot, settings: {ranks: 2}}", ["aot", "on one rank", "ranks 2"]),
        (
            "train.variants.dpo={objective: weighted_sum, terms: [{loss: {objective: aot}}], settings: {ranks: 2}}",
            ["weighted_sum", "on one rank"],
        ),
        ("train.variants.dpo={objective: weighted_sum, terms: []}", ["terms", "at least 1"]),
        ("train.variants.dpo={objective: weighted_sum, terms: [{loss: {objective: dp}}]}", ["terms.0.loss", "'bdpo'"]),
        (
            "train.variants.dpo={objective: weighted_sum, terms: [{loss: {objective: sft, settings: {epochs: 1}}}]}",
            ["settings belong to the variant"],
        ),
        ("train.variants.dpo.objective=dpoo", ["train.variants.dpo", "dpoo", "'bdpo'"]),
        ("train.variants.dpo.settings={epoch: 2}", ["train.variants.dpo.settings", "epoch"]),
        ("train.variants.dpo.settings={epochs: 0}", ["train.variants.dpo.settings", "epochs"]),
        ("train.batch_size=15", ["train", None]),
        ("sweep.variants=[ipo]", ["ipo", "train.variants", "dpo"]),
        ("model.name=org/model", ["model", "either"]),
        ("trainable=most", ["trainable", "most"]),
        ("prepare.max_prompt_tokens=128", ["max_prompt_tokens", "below max_tokens"]),
        ("train.ranks.x=1", ["train.ranks", None]),
        ("evaluate.tasks=gsm8k_cot", ["evaluate.tasks", "list"]),
        ("evaluate.tasks=[ifeval, ifeval]", ["evaluate.tasks", "['ifeval'] stand there more than once"]),
        ("evaluate.limit=0", ["evaluate.limit", "greater than or equal to 1", "0"]),
        ("evaluate.fewshot=-1", ["evaluate.fewshot", "greater than or equal to 0", "-1"]),
        ("evaluate.max_length=0", ["evaluate.max_length", "greater than or equal to 1"]),
        ("evaluate.apply_chat_template=auto", ["evaluate.apply_chat_template", "'auto'"]),
        ("evaluate.task_data=[a]", ["evaluate.task_data", "string"]),
        ("train", ["section.key=value"]),
        ("prepare.files={pairs:[a]}", ["is not valid YAML", "a space follows each colon"]),
        ("train.variants.dpo={objective: kto, desirable_weight: -1.0}", ["desirable_weight", "must lie in [0, "]),
        ("train.variants.dpo={objective: kto, settings: {micro_batch_size: 4}}", ["one micro-batch on one rank"]),
    ],
)
def test_each_mistake_names_key_and_what_is_allowed(override, expected):
    overrides = [override, "train.ranks=2"] if "batch_size" in override else [override]
    with pytest.raises(RequestError) as caught:
        load_params(DEFAULT, overrides)
    for part in filter(None, expected):
        assert part in str(caught.value) or part.split(".")[-1] in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["sketch.mode=exact"], "mode: tensorsketch"),
        (["score.dtype=bfloat16"], "sketch.dtype float32 and score.dtype bfloat16"),
        (["score.quantization=fp8"], "score.quantization fp8"),
        (["score.backend=token_ids"], "score.backend token_ids.*hidden_states"),
        (["sweep.variants=[dpo, auxdpo]", "trainable=last_block"], "last_block.*sketch.source: gradient"),
    ],
)
def test_sketches_by_the_engine_are_refused_where_it_has_none_that_fit(overrides, expected):
    engine = ["sketch.mode=tensorsketch", "sketch.source=engine"]
    load_params(DEFAULT, [*engine, "sweep.variants=[dpo, auxdpo]", "trainable=head"])
    with pytest.raises(RequestError, match=expected):
        load_params(DEFAULT, engine + overrides)


def test_broken_files_are_told_apart(tmp_path):
    with pytest.raises(RequestError, match="does not exist"):
        load_params(tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1,")
    with pytest.raises(RequestError, match="not valid YAML"):
        load_params(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(RequestError, match="must hold sections"):
        load_params(tmp_path / "list.yaml")


def test_a_wrong_request_exits_with_2_and_one_message(tmp_path):
    paths = [
        word for name in ("sft", "tokenizer", "out", "history", "metrics") for word in (f"--{name}", tmp_path / name)
    ]
    result = CliRunner().invoke(main, ["sft", *map(str, paths), "--params", str(DEFAULT), "--set", "sft.epochs=-1"])
    assert result.exit_code == 2
    assert result.output.startswith("Error: ") and "sft.epochs" in result.output and "Traceback" not in result.output


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_an_unknown_variant_is_refused_with_the_known_ones(tmp_path, dry_run):
    names = ("pairs", "model", "reference", "out", "history", "metrics")
    paths = [word for name in names for word in (f"--{name}", str(tmp_path / name))]
    command = ["train", "--variant", "dop", "--seed", "0", "--params", str(DEFAULT), *paths, *dry_run]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    assert "'dop'" in result.output and "'dpo'" in result.output and "Traceback" not in result.output
