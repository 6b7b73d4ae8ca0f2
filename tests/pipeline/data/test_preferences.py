"""Every input form gives the same canonical preference, and every row that is none says why."""

import pytest

from pipeline.data.preferences import Preference, SupervisedExample, parse_pair, parse_supervised
from pipeline.encoding.dialogues import Message, readable
from pipeline.errors import RequestError
from pipeline.params import ColumnNames, PrepareParams
from pipeline.published.files import BadRow, Row
from pipeline.published.forms import Forms

COLUMNS = ColumnNames()


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def parse(values, *, chat=True, **params):
    row = Row("f:7", values)
    settings = {"source": "files", "files": {"pairs": ["f"]}, "sft": {"source": "none"}}
    found = Forms(PrepareParams.model_validate(settings | params)).read(row)
    parsed = [[part] if isinstance(part, BadRow) else parse_pair(part, row.where, chat=chat) for part in found]
    return [preference for part in parsed for preference in part]


def only(values, **options):
    (parsed,) = parse(values, **options)
    return parsed


SUM = (Message("user", "2+2?"),)


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        {"prompt": [user("2+2?")], "chosen": "4", "rejected": [assistant("5")]},
        {"prompt": [user("2+2?")], "chosen": [assistant("4")], "rejected": [assistant("5")]},
        {"prompt": "2+2?", "chosen": [assistant("4")], "rejected": "5"},
        # UltraFeedback-binarized: the prompt beside whole dialogues
        {"prompt": "2+2?", "chosen": [user("2+2?"), assistant("4")], "rejected": [user("2+2?"), assistant("5")]},
        {"prompt": [user("2+2?")], "chosen": [user("2+2?"), assistant("4")], "rejected": [assistant("5")]},
        # implicit prompts
        {"chosen": [user("2+2?"), assistant("4")], "rejected": [user("2+2?"), assistant("5")]},
        {"prompt": None, "chosen": [user("2+2?"), assistant("4")], "rejected": [user("2+2?"), assistant("5")]},
        {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
        {"chosen": "Human: 2+2?\n\nAssistant: 4", "rejected": "Human: 2+2?\n\nAssistant: 5"},
        # the text form split by its publisher
        {"prompt": "\n\nHuman: 2+2?\n\nAssistant:", "chosen": " 4", "rejected": " 5"},
        # single-element lists of responses
        {"prompt": "2+2?", "chosen": ["4"], "rejected": ["5"]},
        {"prompt": "2+2?", "chosen": [[assistant("4")]], "rejected": [[assistant("5")]]},
    ],
)
def test_every_form_of_one_pair_gives_the_same_preference(values):
    assert only(values) == Preference("f:7", SUM, "4", "5", None, None, None)


def test_earlier_turns_and_the_system_turn_belong_to_the_prompt():
    head = [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Hello"), user("2+2?")]
    expected = tuple(Message(turn["role"], turn["content"]) for turn in head)
    whole = only({"chosen": [*head, assistant("4")], "rejected": [*head, assistant("5")]})
    explicit = only({"prompt": head, "chosen": [assistant("4")], "rejected": [assistant("5")]})
    assert whole.prompt == explicit.prompt == expected
    assert readable(whole.prompt) == "[system] Be brief.\n\n[user] Hi\n\n[assistant] Hello\n\n[user] 2+2?"


def test_shared_turns_after_an_explicit_prompt_join_the_prompt():
    more = [assistant("Which base?"), user("Ten.")]
    pair = only({"prompt": "2+2?", "chosen": [*more, assistant("4")], "rejected": [*more, assistant("5")]})
    assert [turn.content for turn in pair.prompt] == ["2+2?", "Which base?", "Ten."]


def test_text_dialogues_of_several_turns_keep_their_white_space_without_a_chat_template():
    head = "\n\nHuman: Hi\n\nAssistant: Hello\nyou\n\nHuman: 2+2?\n\nAssistant:"
    pair = only({"chosen": head + " 4", "rejected": head + " 5"}, chat=False)
    assert (pair.prompt, pair.chosen, pair.rejected) == (head, " 4", " 5")
    chat = only({"chosen": head + " 4", "rejected": head + " 5"})
    assert [turn[:2] for turn in chat.prompt] == [("user", "Hi"), ("assistant", "Hello\nyou"), ("user", "2+2?")]


def test_plain_text_stays_plain_without_a_chat_template():
    assert only({"prompt": " 2+2?", "chosen": "4 ", "rejected": "5"}, chat=False)[1:4] == (" 2+2?", "4 ", "5")


@pytest.mark.parametrize("key", ["prompt", "chosen", "rejected"])
def test_messages_without_a_chat_template_are_a_wrong_request_that_names_the_parameter(key):
    values = {"prompt": "2+2?", "chosen": "4", "rejected": "5"} | {key: [assistant("4")]}
    with pytest.raises(RequestError, match=r"f:7.*prepare\.chat_template"):
        parse(values, chat=False)


def test_several_responses_give_every_chosen_with_every_rejected():
    values = {
        "prompt": "2+2?",
        "chosen": ["4", [assistant("4")][0]["content"] + "."],
        "rejected": ["5", "6"],
        "category": "sums",
        "chosen_reward": [2, 1.5],
        "rejected_reward": [0.5, None],
    }
    pairs = parse(values)
    assert [(p.chosen, p.rejected) for p in pairs] == [("4", "5"), ("4", "6"), ("4.", "5"), ("4.", "6")]
    assert [(p.chosen_reward, p.rejected_reward) for p in pairs] == [(2, 0.5), (2, None), (1.5, 0.5), (1.5, None)]
    assert {p.category for p in pairs} == {"sums"}


def test_several_rejected_message_lists_are_several_responses():
    values = {"prompt": "2+2?", "chosen": "4", "rejected": [[assistant("5")], [user("2+2?"), assistant("6")]]}
    assert [p.rejected for p in parse(values)] == ["5", "6"]


def test_one_bad_alternative_is_named_and_the_others_stay():
    good, bad = parse({"prompt": "2+2?", "chosen": "4", "rejected": ["5", "4"]})
    assert good.rejected == "5"
    assert bad == BadRow("f:7", "rejected 1: chosen and rejected are identical")


def test_columns_can_be_renamed_and_a_single_reward_serves_all():
    columns = {"prompt": "question", "chosen": "yes", "rejected": "no", "category": "kind", "chosen_reward": "score"}
    values = {"question": "2+2?", "yes": ["4", "four"], "no": "5", "kind": 3, "score": 1}
    first, second = parse(values, columns=columns)
    assert (first.category, first.chosen_reward, second.chosen_reward) == ("3", 1.0, 1.0)


def test_not_a_number_in_a_reward_column_means_none():
    values = {"prompt": "2+2?", "chosen": "4", "rejected": "5", "chosen_reward": float("nan")}
    assert only(values).chosen_reward is None


GOOD = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
HEAD = "\n\nHuman: 2+2?\n\nAssistant:"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (GOOD | {"rejected": "4"}, "chosen and rejected are identical"),
        (GOOD | {"prompt": ""}, "the prompt is empty"),
        (GOOD | {"prompt": " \n\t"}, "the prompt is empty"),
        (GOOD | {"prompt": []}, "prompt is empty"),
        (GOOD | {"prompt": [user("  ")]}, "the prompt is empty"),
        (GOOD | {"chosen": ""}, "chosen is empty"),
        (GOOD | {"rejected": "\n \u3000"}, "rejected is empty"),
        (GOOD | {"rejected": [assistant(" ")]}, "rejected is empty"),
        (GOOD | {"chosen": None}, "chosen is null"),
        (GOOD | {"chosen": []}, "chosen is an empty list"),
        (GOOD | {"chosen": 4}, "chosen is int, expected text"),
        (GOOD | {"chosen": ["4", 4]}, "chosen is a list of int and str"),
        (GOOD | {"prompt": 4}, "prompt is int, expected text or a list of messages"),
        ({"prompt": "2+2?", "chosen": "4"}, "no column 'rejected' (found 'prompt', 'chosen')"),
        ({"chosen": "4", "rejected": "5"}, "no prompt: the row has none"),
        (GOOD | {"chosen_reward": "high"}, "chosen_reward is str 'high', expected a number"),
        (GOOD | {"chosen_reward": True}, "expected a number"),
        (GOOD | {"chosen_reward": float("inf")}, "expected a finite number"),
        (GOOD | {"rejected_reward": [1, 2]}, "rejected_reward holds 2 numbers for 1 responses"),
        (GOOD | {"category": {"a": 1}}, "category is dict, expected text"),
        (GOOD | {"category": ["a", 1]}, "category is list, expected text or a list of texts"),
        (GOOD | {"chosen": [{"role": "assistant"}]}, "message 0 of chosen needs the texts role and content"),
        (GOOD | {"chosen": [{"role": "assistant", "content": None}]}, "found {role: str, content: NoneType}"),
        (GOOD | {"chosen": [{"speaker": "gpt", "value": "4"}]}, "found {speaker: str, value: str}"),
        (GOOD | {"chosen": [assistant("4"), user("Thanks")]}, "must end with the assistant's turn"),
        (GOOD | {"chosen": [user("3+3?"), assistant("4")]}, "does not contain the prompt"),
        ({"chosen": [assistant("4")], "rejected": [assistant("5")]}, "no turn before the answer"),
        # hh-rlhf has all of these
        ({"chosen": HEAD + " 4", "rejected": "\n\nHuman: 3+3?\n\nAssistant: 5"}, "turn 1 of 2 differs"),
        (
            {"chosen": HEAD + " 4", "rejected": HEAD + " Hm\n\nHuman: So?\n\nAssistant: 5"},
            "chosen has 2 turns, rejected has 4",
        ),
        ({"chosen": HEAD + " 4", "rejected": HEAD + " 5\n\nHuman: No."}, "rejected must end with the assistant's turn"),
        ({"chosen": HEAD, "rejected": HEAD + " 5"}, "chosen is empty"),
        ({"chosen": HEAD + " 4", "rejected": HEAD + " 4 "}, "identical"),
    ],
)
def test_a_bad_row_says_why(values, reason):
    parsed = only(values)
    assert isinstance(parsed, BadRow) and parsed.where == "f:7"
    assert reason in parsed.reason


@pytest.mark.parametrize("rejected", ["\n\nHuman: 3+3?\n\nAssistant: 5", HEAD + " 5\n\nHuman: No."])
def test_text_dialogues_are_judged_alike_without_a_chat_template(rejected):
    assert isinstance(only({"chosen": HEAD + " 4", "rejected": rejected}, chat=False), BadRow)


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "2+2?", "completion": "4"},
        {"prompt": [user("2+2?")], "completion": "4"},
        {"prompt": [user("2+2?")], "completion": [assistant("4")]},
        {"messages": [user("2+2?"), assistant("4")]},
    ],
)
def test_every_form_of_a_supervised_row_gives_the_same_example(values):
    assert parse_supervised(Row("f:7", values), COLUMNS, chat=True) == SupervisedExample("f:7", SUM, "4")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"prompt": "2+2?"}, "no column 'completion'"),
        ({"prompt": "2+2?", "completion": " "}, "completion is empty"),
        ({"prompt": "", "completion": "4"}, "the prompt is empty"),
        ({"completion": "4"}, "no prompt"),
        ({"prompt": "2+2?", "completion": ["4", "5"]}, "holds 2 texts"),
        ({"messages": [user("2+2?")]}, "must end with the assistant's turn"),
    ],
)
def test_a_bad_supervised_row_says_why(values, reason):
    parsed = parse_supervised(Row("f:7", values), COLUMNS, chat=True)
    assert isinstance(parsed, BadRow) and reason in parsed.reason
