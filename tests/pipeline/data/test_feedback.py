"""Rows of feedback: of unpaired data and of pairs, with responses of other prompts for the baseline."""

import polars as pl
import pytest

from pipeline.data.tables import find_sources
from pipeline.errors import RequestError
from pipeline.params import ModelParams
from tests.pipeline.data import chat_tokenizers
from tests.pipeline.data.preparing import digests, file_params, pair_rows, prepare_into, write_jsonl


@pytest.fixture
def prepared(tmp_path):
    tokenizer = chat_tokenizers.plain()
    tokenizer.save_pretrained(tmp_path / "model")

    def prepare(rows, **params):
        write_jsonl(tmp_path / "in" / "pairs.jsonl", rows)
        found = file_params(tmp_path / "in", **{"sft": {"source": "none"}, "test_share": 0.0} | params)
        summary = prepare_into(tmp_path / "out", found, ModelParams(name=str(tmp_path / "model")))
        file = tmp_path / "out/pairs/feedback.parquet"
        return summary, pl.read_parquet(file) if file.exists() else None

    def said(key: bytes) -> tuple[str, str]:
        [row] = pl.read_parquet(tmp_path / "out/pairs/responses.parquet").filter(response_key=key).to_dicts()
        return tuple(tokenizer.decode(row[name]) for name in ("prompt_ids", "response_ids"))

    prepare.said, prepare.out = said, tmp_path / "out"
    return prepare


def unpaired(*rows: tuple[str, str, bool]) -> list[dict]:
    return [{"prompt": prompt, "completion": text, "label": label} for prompt, text, label in rows]


def test_unpaired_rows_are_feedback_and_no_pairs(prepared):
    summary, rows = prepared(unpaired(("a?", "b", True), ("c?", "d", False), ("c?", "e", True)))
    assert summary["pairs"] == {"train": 0, "test": 0}
    assert summary["feedback"] == {"train": 3, "test": 0} and summary["desirable"] == {"train": 2, "test": 0}
    assert rows["desirable"].to_list() == [True, False, True]
    assert [prepared.said(key) for key in rows["response_key"]] == [("a?", "b</s>"), ("c?", "d</s>"), ("c?", "e</s>")]
    assert rows["source"].to_list() == [f"pairs.jsonl:{n}" for n in (1, 2, 3)]


def test_every_row_gets_a_response_to_another_prompt_and_each_serves_once(prepared):
    _, rows = prepared(pair_rows(5), feedback=True)
    own = [prepared.said(key) for key in rows["response_key"]]
    other = [prepared.said(key) for key in rows["mismatched_key"]]
    assert [prompt for prompt, _ in own] == [prompt for prompt, _ in other]
    answers = {answer: prompt for prompt, answer in own}
    assert all(answers[answer] != prompt for prompt, answer in other)
    assert sorted(answer for _, answer in other) == sorted(answers)  # the same set as the matched ones


def test_pairs_are_split_only_where_that_is_asked_for_and_stay_as_they_were(prepared):
    _, rows = prepared(pair_rows(5))
    assert rows is None
    before = digests(prepared.out)["pairs/pairs.parquet"]
    summary, rows = prepared(pair_rows(5), feedback=True)
    assert digests(prepared.out)["pairs/pairs.parquet"] == before
    assert summary["feedback"]["train"] == 10 and rows["desirable"].to_list() == [True, False] * 5
    assert len(pl.read_parquet(prepared.out / "pairs/responses.parquet")) == 20  # and as many mismatched ones
    _, rows = prepared(pair_rows(5))
    assert rows is None and digests(prepared.out)["pairs/pairs.parquet"] == before


def test_feedback_of_test_prompts_does_not_train(prepared, tmp_path):
    write_jsonl(tmp_path / "in/test.jsonl", unpaired(("c?", "d", True), ("x?", "y", False)))
    rows = unpaired(("a?", "b", True), ("c?", "f", False), ("g?", "h", True), ("a?", "b", True))
    summary, found = prepared(rows, files={"pairs": ["pairs.jsonl"], "test_pairs": ["test.jsonl"]})
    assert summary["feedback"] == {"train": 2, "test": 2}
    assert summary["train_prompts_also_in_test"] == 1 and summary["duplicate_pairs"] == 1
    assert found["prompt_text"].to_list() == ["a?", "g?", "c?", "x?"]
    assert found["feedback_id"].to_list() == [0, 1, 2, 3]


def test_one_prompt_alone_has_its_other_response_and_that_is_told(prepared, capsys):
    summary, rows = prepared(unpaired(("a?", "b", True), ("a?", "c", False)))
    assert [prepared.said(key)[1] for key in rows["mismatched_key"]] == ["c</s>", "b</s>"]
    assert summary["feedback_without_other_prompts"] == 2
    assert "2 rows of feedback stand near no other prompt" in capsys.readouterr().err


def test_mismatched_responses_come_from_rows_that_are_read_together(prepared, monkeypatch):
    """So that they are the same however many processes read."""
    monkeypatch.setattr("pipeline.data.pairing.BATCH_ROWS", 2)
    _, rows = prepared(unpaired(*((f"{n}?", str(n), True) for n in range(6))))
    assert [prepared.said(key)[1] for key in rows["mismatched_key"]] == [f"{n}</s>" for n in (1, 0, 3, 2, 5, 4)]


@pytest.mark.parametrize("label", ["yes", None, 2])
def test_a_label_is_true_or_false(prepared, label):
    row = {"prompt": "a?", "completion": "b", "label": label}
    with pytest.raises(RequestError, match="label"):
        prepared([row], form="unpaired")


def test_responses_of_feedback_are_named_by_their_lines_too(prepared):
    _, rows = prepared([*pair_rows(2), *unpaired(("a?", "b", True), ("c?", "d", False))])
    responses = pl.read_parquet(prepared.out / "pairs/responses.parquet")
    named = find_sources(prepared.out / "pairs", responses["response_key"])
    assert [named[key] for key in rows["response_key"]] == [["pairs.jsonl:3"], ["pairs.jsonl:4"]]
    assert [named[key] for key in rows["mismatched_key"]] == [["pairs.jsonl:3"], ["pairs.jsonl:4"]]
    assert len(named) == len(responses)
