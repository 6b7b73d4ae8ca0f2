"""`sketch-report --offsets`: penalties of trained offsets against gradients taken one response at a time."""

import json
import shutil

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from pipeline.auxdpo.offsets import TABLE_SCHEMA
from pipeline.data.tables import read_pairs, read_responses, write_table
from pipeline.params import SketchParams
from pipeline.reference.sketching import sketch_responses
from pipeline.upkeep.offset_report import report_offsets
from stages.__main__ import main
from tests.pipeline.sketches.slow_sketches import exact_gradients
from tests.tiny import write_model, write_pairs

LAST_BLOCK = "model.layers.1."


def training(pairs):
    return read_responses(pairs).filter(pl.col("split") == "train")


def write_record(file, **changes):
    content = {"objective": "auxdpo", "trainable": "last_block", "hyperparameters": {"beta": 0.1} | changes}
    file.write_text(json.dumps(content))
    return file


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """12 training responses under 4 prompts, their exact gradients as the sketch, and offsets of every size."""
    root = tmp_path_factory.mktemp("offsets")
    write_model(root / "model")
    write_pairs(root / "pairs", 5, test_share=0.2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFCACHE_HOME", str(root / "home"))
        sketch_responses(
            pairs=root / "pairs",
            model=root / "model",
            out=root / "sketches",
            metrics=root / "sketch.json",
            params=SketchParams(mode="exact", audit=256),
            trainable="last_block",
        )
        keys = training(root / "pairs")["response_key"].to_list()
        offsets = np.random.default_rng(0).normal(1.0, 2.0, len(keys)).astype(np.float32)
        table = pa.table([pa.array(keys, pa.binary(16)), pa.array(offsets)], schema=TABLE_SCHEMA)
        write_table(table, root / "offsets.parquet", TABLE_SCHEMA)
        yield root


@pytest.fixture(scope="module")
def gradients(made):
    """{response key: the last block's gradient, flat}, by plain backward."""
    model = AutoModelForCausalLM.from_pretrained(made / "model", dtype=torch.float32).eval()
    found = {}
    for row in training(made / "pairs").iter_rows(named=True):
        named = exact_gradients(model, row["prompt_ids"], row["response_ids"])
        parts = [gradient.flatten() for name, gradient in named.items() if name.startswith(LAST_BLOCK)]
        found[row["response_key"]] = torch.cat(parts).double().numpy()
    return found


def brute_force(made, gradients, weights, centred):
    """||sum_j w_j delta_j g_j||^2 from the definition, response by response."""
    offsets = dict(pl.read_parquet(made / "offsets.parquet").iter_rows())
    prompt = dict(training(made / "pairs").select("response_key", "prompt_key").iter_rows())
    sides = [key for side in ("chosen_key", "rejected_key") for key in read_pairs(made / "pairs", "train")[side]]
    count = {key: sides.count(key) if weights == "sides" else 1 for key in offsets}
    total = np.zeros_like(next(iter(gradients.values())))
    for key, offset in offsets.items():
        if centred:
            siblings = [other for other in offsets if prompt[other] == prompt[key]]
            offset -= sum(count[s] * offsets[s] for s in siblings) / sum(count[s] for s in siblings)
        total += count[key] / sum(count.values()) * offset * gradients[key]
    return float(total @ total)


@pytest.mark.parametrize(("weights", "centred"), [("responses", True), ("responses", False), ("sides", True)])
def test_the_true_penalty_is_that_of_the_definition_and_the_sketched_ones_are_near_it(
    made, gradients, tmp_path, weights, centred
):
    record = write_record(tmp_path / "train.json", weights=weights, centred=centred)
    paths = {"trained": record, "pairs": made / "pairs", "model": made / "model"}
    found = report_offsets(made / "sketches", made / "offsets.parquet", **paths)
    truth = brute_force(made, gradients, weights, centred)
    assert found["penalty_exact"] == pytest.approx(truth, rel=1e-4)
    assert found["penalty"] == pytest.approx(truth, rel=1e-2)  # stored in float16, but not sketched
    assert found["penalty_audit"] == pytest.approx(truth, rel=4 * (2 / 256) ** 0.5)
    assert (found["weights"], found["centred"], found["warnings"]) == (weights, centred, [])


def test_the_command_prints_all_three_and_writes_them(made, gradients, tmp_path):
    record, out = write_record(tmp_path / "train.json", constraint="projection"), tmp_path / "report.json"
    options = {"--offsets": made / "offsets.parquet", "--trained": record, "--pairs": made / "pairs"}
    options |= {"--model": made / "model", "--out": out}
    words = [str(word) for option in options.items() for word in option]
    result = CliRunner().invoke(main, ["sketch-report", str(made / "sketches"), "--exact", *words])
    assert result.exit_code == 0, result.output
    assert "penalty by the sketch" in result.output and "in truth" in result.output
    found = json.loads(out.read_text())["offsets"]
    assert found["penalty_exact"] == pytest.approx(brute_force(made, gradients, "responses", True), rel=1e-4)


def test_without_exact_no_model_is_read_and_another_penalty_than_training_recorded_is_said(made, tmp_path):
    record = write_record(tmp_path / "train.json")
    record.write_text(json.dumps(json.loads(record.read_text()) | {"offsets": {"penalty": 1e-9}}))
    found = report_offsets(made / "sketches", made / "offsets.parquet", trained=record, pairs=made / "pairs")
    assert found["penalty_exact"] is None and "are not those of that run" in found["warnings"][0]


@pytest.mark.parametrize(
    ("given", "absolute"), [({"null_weight": 3.0, "null_weight_absolute": None}, False), ({"null_weight": 3.0}, True)]
)
def test_the_weight_is_told_in_both_units_and_an_old_records_is_the_absolute_one(
    made, gradients, tmp_path, given, absolute
):
    record = write_record(tmp_path / "train.json", **given)
    found = report_offsets(made / "sketches", made / "offsets.parquet", trained=record, pairs=made / "pairs")
    squares = [float(np.square(column).sum()) for column in gradients.values()]
    unit = len(squares) / (4 * sum(squares) / len(squares))
    expected = (3 / unit, 3) if absolute else (3, 3 * unit)
    assert (found["null_weight"], found["null_weight_absolute"]) == pytest.approx(expected, rel=1e-4)


def test_files_that_do_not_belong_together_are_refused_with_what_to_name(made, tmp_path):
    def run(**changes):
        options = {"--offsets": made / "offsets.parquet", "--trained": record, "--pairs": made / "pairs"} | changes
        words = [str(word) for option in options.items() for word in option]
        return CliRunner().invoke(main, ["sketch-report", str(made / "sketches"), *words])

    record = write_record(tmp_path / "train.json")
    fewer = shutil.copytree(made / "pairs", tmp_path / "pairs")
    pairs = read_pairs(fewer)
    write_table(pairs[:-2].to_arrow(), fewer / "pairs.parquet", pa.parquet.read_schema(fewer / "pairs.parquet"))
    for changes, said in (
        ({"--trained": tmp_path / "absent.json"}, "--trained"),
        ({"--pairs": fewer}, "offsets of 12 responses"),
        ({"--offsets": made / "pairs/pairs.parquet"}, "expected ['response_key', 'offset']"),
    ):
        result = run(**changes)
        assert result.exit_code == 2 and said in result.stderr, result.output
    record.write_text(json.dumps({"objective": "dpo"}))
    assert "only auxdpo has offsets" in run().stderr
    alone = CliRunner().invoke(main, ["sketch-report", str(made / "sketches"), "--exact"])
    assert alone.exit_code == 2 and "--offsets" in alone.stderr
