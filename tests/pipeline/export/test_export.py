"""Exports against the store's own Parquet, and the keys of what they say that was asked and answered."""

import json
import shutil

import numpy as np
import polars as pl
import pytest
import torch
from tokenizers import Tokenizer, processors

from cache import open_reference, prompt_key, publish_reference, response_key
from pipeline.export.forms import messages
from tests.project import ScoredProject, write_project
from tests.tiny import EOS

SIDES = ("chosen", "rejected")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return ScoredProject(write_project(tmp_path_factory.mktemp("export")))


@pytest.fixture
def export(project, tmp_path):
    def run(to, *words, reference=project.out, tokenizer=project.model, name="exported"):
        paths = {"--pairs": project.pairs, "--reference": reference, "--tokenizer": tokenizer}
        paths["--out"] = tmp_path / name
        result = project.run("export", "--to", to, *words, *(word for option in paths.items() for word in option))
        return result, tmp_path / name

    return run


def stored(project):
    """Every row by its key, read by polars alone."""
    return {row["response_key"]: row for row in pl.read_parquet(project.out / "*.parquet").to_dicts()}


def pairs_of(project, split):
    return pl.read_parquet(project.pairs / "pairs.parquet").filter(pl.col("split") == split).to_dicts()


@pytest.mark.parametrize(("to", "read"), [("parquet", pl.read_parquet), ("jsonl", pl.read_ndjson)])
def test_every_pair_has_the_stores_values_and_ids_that_hash_to_its_keys(project, export, to, read):
    result, out = export(to, "--split", "train", "--split", "test")
    assert result.exit_code == 0, result.output
    rows = stored(project)
    for split in ("train", "test"):
        found, expected = read(out / f"{split}.{to}").to_dicts(), pairs_of(project, split)
        assert [row["pair_id"] for row in found] == [row["pair_id"] for row in expected]
        for row, pair in zip(found, expected, strict=True):
            assert row["prompt"] == pair["prompt_text"] and row["category"] == pair["category"]
            assert prompt_key(row["prompt_ids"]) == bytes.fromhex(row["prompt_key_hex"]) == pair["prompt_key"]
            for side in SIDES:
                key = response_key(row["prompt_ids"], row[f"{side}_ids"])
                assert key == bytes.fromhex(row[f"{side}_key_hex"]) == pair[f"{side}_key"]
                assert row[f"{side}_sum_logp"] == rows[key]["sum_logp"]
                assert np.float32(row[f"{side}_token_logps"]).tolist() == rows[key]["token_logps"]
                assert row.get(f"{side}_key", key) == key  # JSON has no bytes
    assert json.loads((out / "export.json").read_text())["reference_id"] == project.identity.reference_id


@pytest.mark.parametrize("to", ["parquet", "jsonl", "trl", "fairseq2", "open-instruct"])
def test_an_export_again_replaces_the_first_by_the_same_bytes(export, to):
    words = ["--hash", "0a1b"] if to == "open-instruct" else []
    contents = []
    for _ in range(2):
        result, out = export(to, *words)
        assert result.exit_code == 0, result.output
        contents.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert contents[0] == contents[1] and [path.name for path in out.parent.iterdir()] == [out.name]


@pytest.fixture
def without_three(project, tmp_path):
    """A cache that lacks the chosen response of train pairs 3 and 7 (and whoever shares it); the keys that it lacks."""
    train = pairs_of(project, "train")
    lost = {train[row]["chosen_key"] for row in (3, 7)}
    rows = open_reference(project.out, expect=None).scan().filter(~pl.col("response_key").is_in(list(lost)))
    publish_reference(tmp_path / "partial", rows.collect().to_arrow(), project.identity)
    return tmp_path / "partial", lost


def test_missing_rows_are_counted_and_named_and_an_earlier_export_stays(project, export, without_three):
    partial, lost = without_three
    assert export("parquet")[0].exit_code == 0
    result, out = export("parquet", reference=partial)
    train = pairs_of(project, "train")
    lacking = [pair for pair in train if pair["chosen_key"] in lost]
    assert result.exit_code == 2
    assert f"a response of {len(lacking)} of the {len(train)} train pairs" in result.output
    first = f"pair {lacking[0]['pair_id']} ({lacking[0]['source']}), its chosen response"
    assert f"{first}, key {lacking[0]['chosen_key'].hex()}" in result.output
    assert pl.read_parquet(out / "train.parquet")["chosen_sum_logp"].null_count() == 0
    assert not export("parquet", reference=partial, name="fresh")[1].exists()


@pytest.mark.parametrize("to", ["parquet", "jsonl"])
def test_allowed_missing_rows_are_nulls_and_are_counted(project, export, without_three, to):
    partial, lost = without_three
    result, out = export(to, "--allow-missing", reference=partial)
    found = (pl.read_parquet if to == "parquet" else pl.read_ndjson)(out / f"train.{to}").to_dicts()
    rows, lacking = stored(project), 0
    for row in found:
        for side in SIDES:
            key = bytes.fromhex(row[f"{side}_key_hex"])
            expected = None if key in lost else rows[key]["sum_logp"]
            assert row[f"{side}_sum_logp"] == expected and (row[f"{side}_token_logps"] is None) == (key in lost)
        lacking += row["chosen_sum_logp"] is None
    assert lacking >= 2 and f"{lacking} of them without log-probs" in result.output
    assert json.loads((out / "export.json").read_text())["pairs_without_log_probs"] == {"train": lacking}


def test_open_instructs_tensors_stand_in_the_order_of_the_rows_beside_them(project, export):
    _, out = export("open-instruct", "--hash", "0a1b2c3d4e5f6071")
    tensors = torch.load(out / "0a1b2c3d4e5f6071.pt", weights_only=True, map_location="cpu")
    lines = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    rows, pairs = stored(project), pairs_of(project, "train")
    assert [line["pair_id"] for line in lines] == [pair["pair_id"] for pair in pairs]
    for side in SIDES:
        assert tensors[f"{side}_logps"].dtype == torch.float32
        sums = [rows[pair[f"{side}_key"]]["sum_logp"] for pair in pairs]
        np.testing.assert_array_equal(tensors[f"{side}_logps"].numpy(), np.float32(sums))
        asked = [{"role": "user", "content": pairs[0]["prompt_text"]}]
        assert lines[0][side] == [*asked, {"role": "assistant", "content": pairs[0][f"{side}_text"]}]


@pytest.mark.parametrize("others", ["none", "one side of one", "all"])
def test_open_instruct_is_told_how_many_dialogues_give_the_scored_tokens(project, export, tmp_path, others):
    shutil.copytree(project.model, tmp_path / "tokenizer")
    # The readable answers end with the word w2, which stands for the end token.
    asked, answered = "{{ messages[0]['content'] }} ", "{{ messages[1]['content'][:-2] }}</s>"
    pairs = pairs_of(project, "train")
    one = "{% if messages[1]['content'] == '" + pairs[0]["rejected_text"] + "' %} w9{% endif %}"
    behind, same = {"none": ("", len(pairs)), "one side of one": (one, len(pairs) - 1), "all": (" w9", 0)}[others]
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(asked + answered + behind)
    result, out = export("open-instruct", "--hash", "0a", tokenizer=tmp_path / "tokenizer")
    assert f"scored tokens for {same} of {len(pairs)} pairs" in result.output
    assert ("other tokens" in result.output) == (others != "none")
    assert json.loads((out / "export.json").read_text())["encoded_again"] == {
        "pairs": len(pairs),
        "same_token_ids": same,
    }


def test_open_instruct_is_told_that_a_tokenizer_has_no_template(export):
    result, _ = export("open-instruct", "--hash", "0a")
    assert "no chat template" in result.output


def test_fairseq2_has_targets_without_the_end_that_its_encoder_adds(project, export):
    _, out = export("fairseq2")
    rows = stored(project)
    for line, pair in zip((out / "train.jsonl").read_text().splitlines(), pairs_of(project, "train"), strict=True):
        row = json.loads(line)
        for side in SIDES:
            row_of_side = rows[pair[f"{side}_key"]]
            assert row[f"reference_score_{side}"] == row_of_side["sum_logp"]
            assert [int(word[1:]) for word in row[f"tgt_{side}"].split()] == row_of_side["token_ids"][:-1]
            assert row_of_side["token_ids"][-1] == EOS


def test_a_token_that_the_tokenizer_puts_first_itself_is_not_in_the_text(project, tmp_path, export):
    tokenizer = Tokenizer.from_file(str(project.model / "tokenizer.json"))
    first = int(pairs_of(project, "train")[0]["prompt_text"].split()[0][1:])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"w{first} $A", special_tokens=[(f"w{first}", first)]
    )
    (tmp_path / "tokenizer").mkdir()
    config = (project.model / "tokenizer_config.json").read_bytes()
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_bytes(config)
    tokenizer.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    result, out = export("trl", tokenizer=tmp_path / "tokenizer")
    frame = pl.read_parquet(out / "train.parquet")
    starts = [row["prompt_ids"][0] == first for row in frame.to_dicts()]
    assert 0 < sum(starts) < len(starts)
    for row, starts_so in zip(frame.to_dicts(), starts, strict=True):
        assert [int(word[1:]) for word in row["prompt"].split()] == row["prompt_ids"][starts_so:]
    # All other prompts get a token that they were not scored with, and the export says so.
    assert f"for {sum(starts)} of {len(starts)} pairs" in result.output and "tokens are in prompt_ids" in result.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "open-instruct"], "--hash names the file"),
        (["--to", "parquet", "--hash", "0a"], "--hash names the file"),
        (["--to", "open-instruct", "--hash", "0a", "--split", "train", "--split", "test"], "one --split"),
        (["--to", "open-instruct", "--hash", "../0a"], "letters and digits before .pt"),
        (["--to", "fairseq2", "--allow-missing"], "no way to say that a pair has no log-prob"),
    ],
)
def test_what_makes_no_sense_is_refused(project, tmp_path, words, said):
    paths = ["--pairs", project.pairs, "--reference", project.out, "--out", tmp_path / "out"]
    result = project.run("export", *words, *paths)
    assert result.exit_code == 2 and said in result.output and not (tmp_path / "out").exists()


def test_a_folder_of_other_things_is_not_replaced(export, tmp_path):
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "thesis.tex").write_text("years")
    result, _ = export("parquet")
    assert result.exit_code == 2 and "no earlier export" in result.output
    assert (tmp_path / "exported" / "thesis.tex").read_text() == "years"


def test_turns_are_read_back_from_the_readable_prompt():
    prompt = "[system] Be brief.\n\n[user] One [user] two\n\nthree\n\n[assistant] 3\n\n[user] Four?"
    assert [(turn["role"], turn["content"]) for turn in messages(prompt)] == [
        ("system", "Be brief."),
        ("user", "One [user] two\n\nthree"),
        ("assistant", "3"),
        ("user", "Four?"),
    ]
    assert messages("Plain [user] text") == [{"role": "user", "content": "Plain [user] text"}]
