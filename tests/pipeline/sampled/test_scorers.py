"""Scores by the text alone; solutions are this file's own."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pipeline.errors import RequestError
from pipeline.params import SampleParams
from pipeline.sampled.scorers import Asked, text_scorer

# The first steps agree, and the mistake comes after: read whole, both texts hold the numbers of the right answer.
SOLUTION = "A crate holds 48/2 = <<48/2=24>>24 jars. With 6 more there are 24+6 = <<24+6=30>>30 jars.\n#### 30"
WRONG = "A crate holds 48/2 = <<48/2=24>>24 jars. With 6 more, 24+6 = <<24+6=30>>30. One breaks: 30-1=29 jars.\n#### 29"


def score(texts, reference, **settings):
    return text_scorer(SampleParams(**settings))([Asked("How many?", text, reference) for text in texts])


@pytest.mark.slow
def test_math_compares_final_answers_alone():
    cases = [
        (SOLUTION, SOLUTION, 1.0),
        (WRONG, SOLUTION, 0.0),
        (SOLUTION, WRONG, 0.0),
        ("Of 30 jars one breaks, so 29 are left", SOLUTION, 0.0),  # several numbers, the right one among them
        ("The answer is 24 or 30.", SOLUTION, 0.0),
        ("The answer is 30 jars.", SOLUTION, 1.0),
        ("The answer is 30 million.", SOLUTION, 0.0),
        ("so \\boxed{60/2}", SOLUTION, 1.0),
        ("so \\boxed{30.0}", "\\boxed{30}", 1.0),
        ("so \\boxed{0.5}", "The answer is $\\frac{1}{2}$.", 1.0),
        ("so \\boxed{x + 1}", "\\boxed{1+x}", 1.0),  # variables are read too
        ("so \\boxed{x + 2}", "\\boxed{1+x}", 0.0),
        ("so \\boxed{2 x}", "\\boxed{2}", 0.0),  # x is no unit
        ("so \\boxed{2\\sqrt{2}}", "\\boxed{\\sqrt{8}}", 1.0),
        ("It cost $1,200.", "#### 1200", 1.0),
        ("The answer is yes.", "#### yes", 1.0),
        ("The answer is no.", "#### yes", 0.0),
        ("I don't know.", SOLUTION, 0.0),
        (SOLUTION, "nobody knows", 0.0),
        ("\\boxed{" + "}{" * 50, SOLUTION, 0.0),
    ]
    # One call, since each starts a process.
    found = text_scorer(SampleParams(scorer="math"))([Asked("How many?", *case[:2]) for case in cases])
    assert [(*case[:2], value) for case, value in zip(cases, found, strict=True)] == cases


@pytest.mark.slow
def test_math_works_in_any_thread():
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(score, ["#### 30.0", WRONG], SOLUTION, scorer="math").result() == [1.0, 0.0]


def test_math_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(RequestError, match=r"math-verify, which is not installed.*pip install -e \.\[sample\]"):
        text_scorer(SampleParams(scorer="math"))


def test_exact_looks_past_white_space_and_nothing_else():
    texts = ["two  words\n", "Two words", "two words.", "twowords", ""]
    assert score(texts, " two\nwords", scorer="exact") == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_regex_compares_the_last_matches():
    texts = ["so 1, so 2 ", "so 2, so 1", "two", "so ", "so   2"]
    assert score(texts, "so 9. so 2", scorer="regex", pattern=r"so( *\d*)") == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert score(["so 2"], "two", scorer="regex", pattern=r"so (\d)") == [0.0]
    assert score(["b", "a"], "b", scorer="regex", pattern="(a)|b") == [0.0, 0.0]  # a group that took no part


@pytest.mark.parametrize("settings", [{"scorer": "math"}, {"scorer": "exact"}, {"scorer": "regex", "pattern": "(a)"}])
def test_a_missing_reference_names_the_prompt(settings):
    with pytest.raises(RequestError, match=r"'How many\?' has none.*sample\.files"):
        score(["text"], None, **settings)


REWARDS = """
import numpy as np

def length(prompt, text):
    return len(prompt) + len(text)

def against(prompt, text, reference):
    return np.float32(len(text) - len(reference))

def perhaps(prompt, text, reference="12345", *, keyword=0):
    return len(reference)

def anything(*texts):
    return len(texts)

def odd(prompt, text):
    return {"nan": float("nan"), "word": "1", "none": None, "huge": 10**400, "list": [1]}[text]

def fails(prompt, text):
    raise KeyError("no such answer")

number = 3
"""


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(REWARDS)
    (tmp_path / "broken_rewards.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_rewards", None)


def call(name, texts=("abc",), reference="ab"):
    return score(texts, reference, scorer="function", function=name)


def test_functions_get_as_much_as_they_take(rewards):
    assert call("own_rewards:length", ["", "abc"]) == [9, 12]
    assert call("own_rewards:against", ["", "abc"]) == [-2, 1]
    assert all(type(value) is float for value in call("own_rewards:against"))
    assert call("own_rewards:perhaps") == [2] and call("own_rewards:perhaps", reference=None) == [5]
    assert call("own_rewards:anything") == [3] and call("own_rewards:anything", reference=None) == [2]


def test_a_function_that_needs_a_reference_says_so(rewards):
    assert call("own_rewards:length", reference=None) == [12]
    with pytest.raises(RequestError, match=r"function own_rewards:against compares .* 'How many\?' has none"):
        call("own_rewards:against", reference=None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("no_such_rewards:f", ["no_such_rewards:f", "ModuleNotFoundError", "PYTHONPATH"]),
        ("broken_rewards:f", ["broken_rewards:f", "ZeroDivisionError", "division by zero"]),
        ("own_rewards:f", ["own_rewards:f", "own_rewards.py has no f", "(prompt, text)"]),
        ("own_rewards:number", ["own_rewards:number", "number = 3", "can't be called"]),
    ],
)
def test_a_function_that_is_not_there_is_told_before_anything_is_scored(rewards, name, expected):
    with pytest.raises(RequestError) as caught:
        text_scorer(SampleParams(scorer="function", function=name))
    for part in expected:
        assert part in str(caught.value)


@pytest.mark.parametrize("text", ["nan", "word", "none", "huge", "list"])
def test_what_is_not_a_finite_number_names_function_value_and_prompt(rewards, text):
    with pytest.raises(RequestError) as caught:
        call("own_rewards:odd", [text])
    found = {"nan": "nan", "word": "'1'", "none": "None", "huge": "1000", "list": "[1]"}[text]
    for part in ("own_rewards:odd", f"returned {found}", "'How many?'", "finite number"):
        assert part in str(caught.value)


def test_an_exception_of_a_function_names_function_and_prompt(rewards):
    with pytest.raises(RequestError, match=r"own_rewards:fails raised KeyError: 'no such answer'.*'How many\?'"):
        call("own_rewards:fails")


def test_long_prompts_are_shortened_in_errors():
    with pytest.raises(RequestError) as caught:
        text_scorer(SampleParams(scorer="exact"))([Asked("many words " * 500, "a", None)])
    assert " ...' has none" in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("settings", [{}, {"scorer": "reward_model", "reward_model": "folder"}])
def test_scores_that_need_no_text_or_a_model_are_not_made_here(settings):
    with pytest.raises(ValueError, match="does not score by the text alone"):
        text_scorer(SampleParams(**settings))


@pytest.mark.slow
def test_scores_are_in_the_order_of_the_answers():
    numbers = np.random.default_rng(0).integers(0, 4, 40)
    answers = [Asked(f"p{i}", f"#### {number}.0", f"#### {i % 4}") for i, number in enumerate(numbers)]
    expected = [float(number == i % 4) for i, number in enumerate(numbers)]
    assert text_scorer(SampleParams(scorer="math"))(answers) == expected
