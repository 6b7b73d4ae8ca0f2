"""Pairs that are within the rules and probably not what was meant are counted and told, and nothing is left out."""

import pytest

from pipeline.params import ModelParams
from tests.pipeline.data import chat_tokenizers
from tests.pipeline.data.preparing import file_params, prepare_into, write_jsonl

SOUND = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}


@pytest.fixture
def prepared(tmp_path, capsys):
    """A function of extra rows: prepares them after a sound one; returns the summary and what was said."""
    chat_tokenizers.chatml().save_pretrained(tmp_path / "model")

    def prepare(*rows, **columns):
        write_jsonl(tmp_path / "in" / "pairs.jsonl", [SOUND, *rows])
        params = file_params(tmp_path / "in", sft={"source": "none"}, test_share=0.0, columns=columns)
        summary = prepare_into(tmp_path / "out", params, ModelParams(name=str(tmp_path / "model")))
        assert summary["pairs"]["train"] == 1 + len(rows)
        return summary, capsys.readouterr().err

    return prepare


COUNTS = [
    "pairs_rewarded_otherwise",
    "prompts_with_both_orders",
    "responses_with_special_tokens",
    "responses_that_repeat_their_prompt",
]


def test_of_sound_pairs_nothing_is_said(prepared):
    rated = {"prompt": "3 + 3?", "chosen": "6", "rejected": "7", "chosen_reward": 2, "rejected_reward": 1}
    summary, said = prepared(rated)
    assert [summary[name] for name in COUNTS] == [0] * 4 and summary["unused_columns"] == []
    assert "prepare:" not in said


@pytest.mark.parametrize(
    ("rows", "name", "count", "hint"),
    [
        (
            [
                {"prompt": "a?", "chosen": "b", "rejected": "c", "chosen_reward": 1, "rejected_reward": 1},
                {"prompt": "a?", "chosen": "d", "rejected": "e", "chosen_reward": 1, "rejected_reward": 2},
            ],
            "pairs_rewarded_otherwise",
            2,
            "are columns swapped?",
        ),
        ([{"prompt": "2 + 2?", "chosen": "5", "rejected": "4"}], "prompts_with_both_orders", 1, "cancel out"),
        (
            [{"prompt": "a?", "chosen": "b<|endoftext|>", "rejected": "c"}],
            "responses_with_special_tokens",
            1,
            "chat_template: never",
        ),
        (
            [{"prompt": "Q: a\nA:", "chosen": "Q: a\nA: b", "rejected": "Q: a\nA: c"}],
            "responses_that_repeat_their_prompt",
            2,
            "scored twice",
        ),
    ],
)
def test_each_kind_is_counted_and_told_with_a_hint(prepared, rows, name, count, hint):
    summary, said = prepared(*rows)
    assert {other: summary[other] for other in COUNTS} == dict.fromkeys(COUNTS, 0) | {name: count}
    assert f"prepare: {count} " in said and hint in said


def test_columns_that_nothing_was_taken_from_are_named(prepared):
    row = {"prompt": "a?", "chosen": "b", "rejected": "c", "sistem": "Be brief.", "score": 3, "kind": "sums"}
    summary, said = prepared(row, category="kind")
    assert summary["unused_columns"] == ["score", "sistem"]
    assert "columns not used: score, sistem" in said
