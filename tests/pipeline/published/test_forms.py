"""Published schemas -> the very tokens of prompt, chosen and rejected. Column names and types follow the published
sets; every row is invented."""

import json

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import RequestError
from pipeline.params import ModelParams
from tests.pipeline.data.chat_tokenizers import byte_tokenizer
from tests.pipeline.data.preparing import file_params, prepare_into, write_jsonl

TEMPLATE = (
    "{% if tools %}[tools]{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '{' + c.function.name + '}' }}{% endfor %}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    byte_tokenizer(["</s>", "<call>"], eos="</s>", template=TEMPLATE).save_pretrained(folder)
    return ModelParams(name=str(folder))


class Prepared:
    def __init__(self, folder, model, tokenizer, summary):
        self.summary = summary
        pairs = pl.read_parquet(folder / "pairs/pairs.parquet")
        rows = pl.read_parquet(folder / "pairs/responses.parquet").to_dicts()
        responses = {row["response_key"]: row for row in rows}
        self.pairs = []
        for pair in pairs.to_dicts():
            sides = [responses[pair[f"{side}_key"]] for side in ("chosen", "rejected")]
            assert sides[0]["prompt_ids"] == sides[1]["prompt_ids"]
            ids = [sides[0]["prompt_ids"], *(side["response_ids"] for side in sides)]
            self.pairs.append(tuple(tokenizer.decode(part) for part in ids))
        self.rewards = pairs.select("chosen_reward", "rejected_reward").rows()
        self.categories = pairs["category"].to_list()


@pytest.fixture
def prepared(tmp_path, model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.name)

    def prepare(*rows, **params):
        write_jsonl(tmp_path / "in" / "pairs.jsonl", rows)
        found = file_params(tmp_path / "in", **{"sft": {"source": "none"}, "test_share": 0.0} | params)
        return Prepared(tmp_path / "out", model, tokenizer, prepare_into(tmp_path / "out", found, model))

    return prepare


def pair(prompt, chosen, rejected):
    """Decoded tokens of one pair whose turns are closed."""
    return (f"{prompt}[assistant]", f"{chosen}</s>", f"{rejected}</s>")


def said(role, content, **more):
    return {"role": role, "content": content} | more


def gpt(role, value):
    return {"from": role, "value": value}


FOX = pair("[user]Fox?", "Red", "Blue")
SHP = {"post_id": "p", "history": "Fox?", "human_ref_A": "Red", "human_ref_B": "Blue", "score_A": 9, "score_B": 4}
ARENA = {
    "conversation_a": [said("user", "Fox?"), said("assistant", "Red")],
    "conversation_b": [said("user", "Fox?"), said("assistant", "Blue")],
    "language": "English",
}
ARENA_55K = {"prompt": '["Fox?"]', "response_a": '["Red"]', "response_b": '["Blue"]'}
OUTCOMES = ("winner_model_a", "winner_model_b", "winner_tie")

CASES = {
    "Intel/orca_dpo_pairs": (
        [{"system": "Be brief.", "question": "Fox?", "chosen": "Red", "rejected": "Blue"}],
        "pairs",
        [pair("[system]Be brief.[user]Fox?", "Red", "Blue")],
    ),
    "the prompt in a column called input": (
        [{"system": "", "input": "Fox?", "chosen": "Red", "rejected": "Blue"}],
        "pairs",
        [FOX],
    ),
    "alpaca": (
        [
            {"instruction": "Colour of:", "input": "fox", "chosen": "Red", "rejected": "Blue"}
            | {"system": "Be brief.", "history": [["Hi", "Yes?"]]},
            {"instruction": "Fox?", "input": "", "chosen": "Red", "rejected": "Blue", "system": None, "history": []},
        ],
        "pairs",
        [pair("[system]Be brief.[user]Hi[assistant]Yes?</s>[user]Colour of:\nfox", "Red", "Blue"), FOX],
    ),
    "alpaca, earlier": ([{"instruction": "Fox?", "input": "", "output": ["Red", "Blue"]}], "alpaca_list", [FOX]),
    "message dict": (
        [
            {
                "messages": [said("user", "Fox?")],
                "chosen": said("assistant", "Red"),
                "rejected": said("assistant", "Blue"),
            }
        ],
        "pairs",
        [FOX],
    ),
    "ShareGPT": (
        [
            {
                "conversations": [
                    gpt("system", "Be brief."),
                    gpt("human", "Hi"),
                    gpt("gpt", "Yes?"),
                    gpt("human", "Fox?"),
                ],
                "chosen": gpt("gpt", "Red"),
                "rejected": gpt("gpt", "Blue"),
            }
        ],
        "pairs",
        [pair("[system]Be brief.[user]Hi[assistant]Yes?</s>[user]Fox?", "Red", "Blue")],
    ),
    "ShareGPT with calls": (
        [
            {
                "conversations": [
                    gpt("human", "Light on"),
                    gpt("function_call", '{"name": "light", "arguments": {"on": true}}'),
                    gpt("observation", "ok"),
                ],
                "tools": '[{"name": "light"}]',
                "chosen": gpt("gpt", "Done"),
                "rejected": gpt("gpt", "No"),
            }
        ],
        "pairs",
        [pair('[tools][{"name": "light"}][user]Light on[assistant]{light}</s>[tool]ok', "Done", "No")],
    ),
    "OpenAI": (
        [
            {
                "input": {"messages": [said("user", "Fox?")], "tools": [], "parallel_tool_calls": True},
                "preferred_output": [said("assistant", "Red")],
                "non_preferred_output": [said("assistant", "Blue")],
            }
        ],
        "openai",
        [FOX],
    ),
    "ms-swift": (
        [
            {"messages": [said("user", "Fox?"), said("assistant", "Red")], "rejected_response": "Blue"},
            {
                "messages": [said("system", "Be brief."), said("user", "Fox?"), said("assistant", "Red")],
                "rejected_messages": [said("system", "Be brief."), said("user", "Fox?"), said("assistant", "Blue")],
            },
            {"query": "Hen?", "response": "White", "rejected_response": "Blue", "history": [["Fox?", "Red"]]},
        ],
        "swift",
        [
            FOX,
            pair("[system]Be brief.[user]Fox?", "Red", "Blue"),
            pair("[user]Fox?[assistant]Red</s>[user]Hen?", "White", "Blue"),
        ],
    ),
    "UltraInteract": (
        [
            {
                "task": "Coding",
                "trajectory": [gpt("user", "Fox?"), gpt("assistant", "Hm."), gpt("user", "Well?")],
                "chosen": "Red",
                "rejected": "Blue",
            }
        ],
        "pairs",
        [pair("[user]Fox?[assistant]Hm.</s>[user]Well?", "Red", "Blue")],
    ),
    "chosen and rejected responses": (
        [{"instruction": "Fox?", "chosen_response": "Red", "rejected_response": "Blue"}],
        "pairs",
        [FOX],
    ),
    "hh with text columns": (
        [{"prompt": "\n\nHuman: Fox?\n\nAssistant:", "chosen": " Red", "rejected": " Blue"}],
        "pairs",
        [FOX],
    ),
    "SHP": (
        [SHP | {"labels": 1}, SHP | {"labels": 0, "history": "Hen?"}],
        "shp",
        [FOX, pair("[user]Hen?", "Blue", "Red")],
    ),
    "HelpSteer3": (
        [
            {"context": [said("user", "Fox?")], "response1": "Red", "response2": "Blue", "overall_preference": -2},
            {"context": [said("user", "Hen?")], "response1": "Blue", "response2": "White", "overall_preference": 1},
        ],
        "helpsteer3",
        [FOX, pair("[user]Hen?", "White", "Blue")],
    ),
    "HelpSteer2": (
        [{"prompt": "Fox?", "response_1": "Blue", "response_2": "Red", "preference_strength": 3}],
        "helpsteer2",
        [FOX],
    ),
    "PKU-SafeRLHF": (
        [
            {
                "prompt": "Fox?",
                "response_0": "Blue",
                "response_1": "Red",
                "better_response_id": 1,
                "safer_response_id": 0,
            }
        ],
        "pku_saferlhf",
        [FOX],
    ),
    "chatbot arena": (
        [ARENA | {"winner": "model_a"}, ARENA | {"winner": "model_b"}],
        "arena",
        [FOX, pair("[user]Fox?", "Blue", "Red")],
    ),
    "arena 55k": (
        [ARENA_55K | dict(zip(OUTCOMES, (0, 1, 0), strict=True))],
        "arena_55k",
        [pair("[user]Fox?", "Blue", "Red")],
    ),
    "UltraFeedback raw": (
        [
            {
                "instruction": "Fox?",
                "completions": [
                    {"response": "Blue", "fine-grained_score": 1.5, "overall_score": 10.0},
                    {"response": "Red", "fine-grained_score": 4.5, "overall_score": 9.0},
                    {"response": "Pink", "fine-grained_score": 3.0, "overall_score": 8.0},
                ],
            }
        ],
        "ultrafeedback",
        [FOX],
    ),
    "Nectar": (
        [
            {
                "prompt": "\n\nHuman: Fox?\n\nAssistant: ",
                "answers": [{"answer": "Blue", "rank": 7.0}, {"answer": "Red", "rank": 1.0}],
            }
        ],
        "nectar",
        [FOX],
    ),
    "MMLU-Pro": (
        [{"question": "Fox?", "options": ["Blue", "N/A", "Red"], "answer": "C", "answer_index": 2, "category": "zoo"}],
        "multiple_choice",
        [pair("[user]Fox?\nA. Blue\nB. Red", "B. Red", "A. Blue")],
    ),
    "ARC": (
        [{"question": "Fox?", "choices": {"text": ["Red", "Blue"], "label": ["1", "2"]}, "answerKey": "1"}],
        "multiple_choice",
        [pair("[user]Fox?\nA. Red\nB. Blue", "A. Red", "B. Blue")],
    ),
}


@pytest.mark.parametrize(("rows", "form", "expected"), CASES.values(), ids=CASES)
def test_every_schema_gives_the_tokens_that_it_means(prepared, rows, form, expected):
    found = prepared(*rows)
    assert found.pairs == expected
    assert found.summary["forms"] == {form: len(rows)}


@pytest.mark.parametrize(("rows", "form", "expected"), CASES.values(), ids=CASES)
def test_a_named_form_is_the_same_as_the_found_one(prepared, rows, form, expected):
    assert prepared(*rows, form=form).pairs == expected


def test_columns_of_json_are_decoded_into_the_documented_forms(prepared, tmp_path):
    """Arrow's arrow.json extension, which datasets writes for columns of mixed forms."""
    values = {
        "prompt": ["Fox?", [said("user", "Hen?")]],
        "chosen": ["Red", "White"],
        "rejected": ["Blue", ["Blue", "Pink"]],
    }
    columns = {
        name: pa.ExtensionArray.from_storage(pa.json_(), pa.array([json.dumps(v) for v in column]))
        for name, column in values.items()
    }
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "in" / "pairs.parquet")
    found = prepared(files={"pairs": ["pairs.parquet"]})
    assert found.pairs == [FOX, pair("[user]Hen?", "White", "Blue"), pair("[user]Hen?", "White", "Pink")]


def test_rows_of_several_forms_may_stand_in_one_file(prepared):
    rows = [CASES["SHP"][0][0], CASES["OpenAI"][0][0] | {"input": {"messages": [said("user", "Hen?")]}}]
    found = prepared(*rows)
    assert found.pairs == [FOX, pair("[user]Hen?", "Red", "Blue")]
    assert found.summary["forms"] == {"shp": 1, "openai": 1}


def test_scores_of_winners_and_lists_become_rewards_with_the_better_one_higher(prepared):
    assert prepared(SHP | {"labels": 1}).rewards == [(9.0, 4.0)]
    assert prepared(*CASES["Nectar"][0]).rewards == [(-1.0, -7.0)]


def test_ties_are_dropped_and_counted(prepared, capsys):
    win = ARENA | {"winner": "model_a"}
    found = prepared(win, *(ARENA | {"winner": tie} for tie in ("tie", "tie (bothbad)", "both_bad")))
    assert found.pairs == [FOX] and found.summary["dropped_ties"] == 3
    assert "prepare: ties left out: 3" in capsys.readouterr().err
    rows = [{"context": [said("user", "Fox?")], "response1": "Red", "response2": "Blue"} for _ in range(2)]
    found = prepared(rows[0] | {"overall_preference": 0}, rows[1] | {"overall_preference": -1})
    assert found.pairs == [FOX] and found.summary["dropped_ties"] == 1


def test_a_winner_of_ones_own_columns_by_name_label_or_sign(prepared):
    row = {"prompt": "Fox?", "left": "Red", "right": "Blue", "kind": ["zoo", "colour"]}
    rule = {"column": "best", "a": "left", "b": "right"}
    assert prepared(row | {"best": "left"}, preferred=rule).pairs == [FOX]
    labelled = rule | {"a_wins": ["L", "l"], "b_wins": ["R"]}
    assert prepared(row | {"best": "l"}, preferred=labelled).pairs == [FOX]
    assert prepared(row | {"best": 0.3}, preferred=rule | {"a_wins": "positive", "b_wins": "negative"}).pairs == [FOX]
    numbered = rule | {"a_wins": [1], "b_wins": [2], "a_reward": "x", "b_reward": "y"}
    found = prepared(row | {"best": "2", "x": 1, "y": 5}, preferred=numbered, columns={"category": "kind"})
    assert found.pairs == [pair("[user]Fox?", "Blue", "Red")] and found.rewards == [(5.0, 1.0)]
    assert found.categories == ["zoo, colour"]


SCORED = [("Blue", 1), ("Red", 4), ("Pink", 3), ("Rose", 3)]


@pytest.mark.parametrize(
    ("rule", "expected", "ties"),
    [
        ({"pairs": "best_vs_worst"}, [("Red", "Blue")], 0),
        ({"pairs": "adjacent"}, [("Red", "Pink"), ("Rose", "Blue")], 1),
        (
            {"pairs": "all"},
            [("Red", "Pink"), ("Red", "Rose"), ("Red", "Blue"), ("Pink", "Blue"), ("Rose", "Blue")],
            1,
        ),
        ({"pairs": "all", "min_gap": 2}, [("Red", "Blue"), ("Pink", "Blue"), ("Rose", "Blue")], 3),
        ({"pairs": "best_vs_random", "min_gap": 2}, [("Red", "Blue")], 0),
        ({"pairs": "best_vs_worst", "min_gap": 4}, None, 1),
    ],
)
def test_lists_of_scored_responses_make_the_pairs_that_are_asked_for(prepared, rule, expected, ties):
    answers = [{"said": {"text": text}, "marks": {"help.ful": [], "overall": str(score)}} for text, score in SCORED]
    other = {
        "prompt": "Hen?",
        "list": [{"said": {"text": t}, "marks": {"overall": s}} for t, s in (("W", 9), ("B", 1))],
    }
    rule = {"column": "list", "text": "said.text", "score": "marks.overall"} | rule
    found = prepared({"prompt": "Fox?", "list": answers}, other, ranked=rule)
    mine = [p for p in found.pairs if "Fox" in p[0]]
    assert mine == [pair("[user]Fox?", *sides) for sides in expected or ()]
    assert found.summary["dropped_ties"] == ties


def test_texts_beside_a_list_of_scores_and_responses_that_nobody_scored(prepared):
    row = {"prompt": "Fox?", "texts": ["Blue", "Green", "Red"], "ranks": [3, None, 1]}
    assert prepared(row, ranked={"column": "texts", "score": "ranks", "better": "lower"}).pairs == [FOX]


def test_the_random_worse_one_is_the_same_every_time_and_not_always_the_same_one(prepared):
    rows = [{"prompt": f"{n}?", "texts": [*"abcdef"], "scores": [6, 5, 4, 3, 2, 1]} for n in range(20)]
    rule = {"column": "texts", "score": "scores", "pairs": "best_vs_random"}
    first, again = (prepared(*rows, ranked=rule).pairs for _ in range(2))
    assert first == again and len({p[2] for p in first}) > 2
    assert prepared(*rows, ranked=rule | {"seed": 1}).pairs != first


def test_a_published_list_takes_another_policy_or_score(prepared):
    row = CASES["UltraFeedback raw"][0][0]
    assert prepared(row, ranked={"score": "overall_score"}).pairs == [pair("[user]Fox?", "Blue", "Pink")]
    assert len(prepared(row, ranked={"pairs": "all"}).pairs) == 3


def test_all_wrong_options_of_a_question(prepared):
    row = {"question": "Fox?", "options": ["Blue", "Red", "Pink"], "answer_index": 1}
    shown = "[user]Fox?\nA. Blue\nB. Red\nC. Pink"
    assert prepared(row, wrong_options="all").pairs == [pair(shown, "B. Red", o) for o in ("A. Blue", "C. Pink")]
    assert len(prepared(row).pairs) == 1


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (("The sky is blue.", "The sky is green."), ("The sky is", " blue.</s>", " green.</s>")),
        (("The sky is blue.", "The sky is black."), ("The sky is", " blue.</s>", " black.</s>")),
        (("2+2=4", "2+2=5"), ("2+2=", "4</s>", "5</s>")),
    ],
)
def test_what_plain_texts_begin_with_is_their_prompt_without_a_template(prepared, texts, expected):
    row = dict(zip(("chosen", "rejected"), texts, strict=True))
    assert prepared(row, chat_template="never").pairs == [expected]


def test_texts_that_were_rendered_before_are_noticed_and_end_once(prepared, capsys):
    row = {"prompt": "Fox?", "chosen": "Red</s>\n", "rejected": "Blue</s></s>"}
    assert prepared(row).pairs == [FOX]
    assert "2 responses that hold special tokens" in capsys.readouterr().err
    rendered = {"prompt": "[user]Fox?[assistant]", "chosen": "Red</s>\n", "rejected": "Blue</s></s>"}
    assert prepared(rendered, chat_template="never").pairs == [FOX]
    assert "special tokens" not in capsys.readouterr().err


def test_a_special_token_that_closes_no_turn_stays_at_the_end_of_a_text(prepared):
    row = {"prompt": "Fox?", "chosen": "Red<call>", "rejected": "Blue"}
    assert prepared(row).pairs == [pair("[user]Fox?", "Red<call>", "Blue")]


def test_what_the_template_leaves_out_is_counted(prepared, capsys):
    row = {"prompt": "Fox?", "chosen": [said("assistant", "Red", reasoning_content="It is.")], "rejected": "Blue"}
    found = prepared(row | {"chat_template_kwargs": {"enable_thinking": False}})
    assert found.summary["fields_not_rendered"] == {"enable_thinking": 1, "reasoning_content": 1}
    assert "renders nothing of reasoning_content in 1 of the dialogues" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "params", "reason"),
    [
        (
            {"question": "?", "better": "a", "worse": "b"},
            {},
            r"'chosen' or 'rejected' \(found 'question', 'better', 'worse'",
        ),
        (SHP | {"labels": 2}, {}, r"labels is 2, expected one of \[1\] \(human_ref_A\), \[0\] \(human_ref_B\)"),
        (ARENA | {"winner": "model_c"}, {}, "winner is 'model_c'"),
        ({"instruction": "Fox?", "output": ["a", "b", "c"]}, {}, "output holds 3, expected two"),
        ({"chosen": "a b", "rejected": "a c"}, {}, "prepare.chat_template: never"),
        (
            {"chosen": "a b", "rejected": "a c", "Prompt": "?"},
            {"chat_template": "never"},
            "no prompt: the row has none",
        ),
        ({"question": "?", "options": ["a"], "answer_index": 0}, {}, "no wrong option"),
        ({"question": "?", "options": ["a", "b"], "answer": "E"}, {}, "answer is 'E', expected"),
        ({"prompt": "?", "list": [{"a": 1}]}, {"ranked": {"column": "list", "text": "t", "score": "a"}}, "without 't'"),
        ({"prompt": "?", "a": "x", "b": "y"}, {"preferred": {"column": "w", "a": "a", "b": "b"}}, "no column 'w'"),
        (
            {"messages": [said("user", "?"), said("assistant", "x")], "chosen": "a", "rejected": "b"},
            {},
            "ends with an assistant's turn that is not the chosen response",
        ),
        (
            {"prompt": [said("system", "A"), said("user", "?")], "system": "B", "chosen": "a", "rejected": "b"},
            {},
            "the system column and the dialogue's own system turn differ",
        ),
        ({"instruction": "?", "input": 3, "chosen": "a", "rejected": "b"}, {}, "input is int beside a prompt"),
        ({"prompt": "?", "history": [["a"]], "chosen": "a", "rejected": "b"}, {}, "history must hold pairs of texts"),
    ],
)
def test_what_can_not_be_read_says_what_was_found(prepared, row, params, reason):
    with pytest.raises(RequestError, match=f"pairs.jsonl:1: .*{reason}"):
        prepared(row, **params)


@pytest.mark.parametrize("row", [SHP | {"labels": 1}, ARENA | {"winner": "model_a"}], ids=["SHP", "arena"])
def test_no_column_of_two_competitors_is_ever_called_the_chosen_one(prepared, row):
    """Renamed columns are told the way of prepare.preferred before a setting that could swap pairs."""
    renamed = {f"my_{name}": value for name, value in row.items()}
    with pytest.raises(RequestError) as error:
        prepared(renamed)
    assert "prepare.preferred" in str(error.value)
    assert not any(f"chosen: {name}" in str(error.value) for name in renamed)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"form": "preferred"}, "needs prepare.preferred"),
        ({"form": "ranked"}, "needs prepare.ranked"),
        ({"preferred": {"column": "w", "a": "x", "b": "x"}}, "are both 'x'"),
        ({"preferred": {"column": "w", "a": "x", "b": "y", "a_wins": [1], "b_wins": [1]}}, "can't mean"),
        ({"preferred": {"column": "w", "a": "x", "b": "y", "a_wins": "positive"}}, "other positive"),
        ({"preferred": {"column": "w", "a": "x", "b": "y"}, "form": "shp"}, "goes with form: preferred"),
        ({"ranked": {"column": "list"}}, "needs prepare.ranked.score"),
    ],
)
def test_contradictory_parameters_are_refused(tmp_path, params, message):
    with pytest.raises(ValueError, match=message):
        file_params(tmp_path, **params)


def test_a_system_turn_without_a_template_says_how_to_leave_it_out(prepared):
    row = {"system": "Be brief.", "prompt": "Fox?", "chosen": "Red", "rejected": "Blue"}
    with pytest.raises(RequestError, match=r"prepare\.columns\.system: null"):
        prepared(row, chat_template="never")
    assert prepared(row, chat_template="never", columns={"system": None}).pairs == [("Fox?", "Red</s>", "Blue</s>")]


def test_columns_of_other_names_are_taken_where_they_are_named(prepared):
    row = {
        "ask": "Fox?",
        "more": "Now.",
        "rules": "Be brief.",
        "past": [["Hi", "Yes?"]],
        "chosen": "a",
        "rejected": "b",
    }
    columns = {"prompt": "ask", "input": "more", "system": "rules", "history": "past"}
    expected = "[system]Be brief.[user]Hi[assistant]Yes?</s>[user]Fox?\nNow."
    assert prepared(row, columns=columns).pairs == [pair(expected, "a", "b")]


def test_messages_that_hold_the_chosen_answer_too_are_the_prompt_without_it(prepared):
    row = {"messages": [said("user", "Fox?"), said("assistant", "Red")], "chosen": "Red", "rejected": "Blue"}
    assert prepared(row).pairs == [FOX]


def test_a_column_that_some_row_was_read_from_is_used_and_one_of_nulls_is_not_missed(prepared):
    rows = CASES["alpaca"][0] + [{"instruction": "Hen?", "chosen": "a", "rejected": "b", "input": None, "note": None}]
    assert prepared(*rows).summary["unused_columns"] == []


def test_tools_that_no_template_reads_are_told(prepared):
    row = {"prompt": "Fox?", "chosen": "Red", "rejected": "Blue", "tools": [{"name": "light"}]}
    assert prepared(row, chat_template="never").summary["unused_columns"] == ["tools"]
    assert prepared(row).summary["unused_columns"] == []


def test_columns_of_sft_files_that_nothing_was_taken_from_are_told(prepared, tmp_path):
    write_jsonl(tmp_path / "in/sft.jsonl", [{"prompt": "a?", "completion": "b", "score": 1}])
    row = {"prompt": "Fox?", "chosen": "Red", "rejected": "Blue"}
    found = prepared(row, sft={"source": "files", "files": ["sft.jsonl"]})
    assert found.summary["unused_columns"] == ["score"]
