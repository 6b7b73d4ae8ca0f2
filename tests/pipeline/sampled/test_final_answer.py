"""The final answer of a solution, among everything else that is said on the way to it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.sampled.final_answer import final_answer

PIECES = st.sampled_from(["x", "\\frac", "\\{", "\\}", "1"])  # of LaTeX; two of them are braces on paper


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Ann has 7 pens.\n#### 7\nNo, she lost one.\n#### 6", "6"),
        ("#### 24 \nThe answer is 3.", "24"),
        ("#### 5\nThat is, $\\boxed{6}$.", "6"),  # the first is a heading
        ("### Plan 1\n##### Note 2", "2"),  # headings are no marks, the number counts all the same
        ("It is \\boxed{3}, or rather \\boxed{\\frac{1}{2}}. The answer is 9.", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\left\\{ x}", "\\left\\{ x"),  # one brace on paper and none of LaTeX's
        ("\\boxed{\\boxed{4}}", "4"),
        ("\\boxed{8} and then \\boxed{9 + ", "8"),  # cut off by the limit of tokens
        ("The answer is 1. Wait: the ANSWER IS 3.25. I took 2 steps.", "3.25"),
        ("**Answer:** 12 apples\nChecked 3 times.", "12 apples"),
        ("The answer is **24**.", "24"),
        ("Answer:\n\n24", "24"),
        ("The answer is: $\\frac{3}{4}$.", "\\frac{3}{4}"),
        ("The answer is \\(x + 1\\).", "x + 1"),
        ("The answer is yes! There are 3.", "yes"),
        ("The answer isn't 5 but 6", "6"),
        ("The answers are 5 and 6", "6"),
        ("First 10, then 4 more make 14 in all", "14"),
        ("10-3", "3"),
        ("It fell to -3", "-3"),
        ("It fell to −3", "-3"),
        ("Half of it, 1/2", "1/2"),
        ("about .5", ".5"),
        ("1.5e3", "1.5e3"),
        ("7 in column x2", "7"),
        ("He pays -\\$5", "-5"),
        ("a rise of 50\\%", "50\\%"),
        ("5, 6,300", "6300"),
        ("I don't know.", None),
        ("", None),
        ("####  ", None),
        ("The answer is", None),
        ("#### \nThe answer is 5", "5"),
    ],
)
def test_the_last_mark_counts_then_the_box_then_what_is_said_then_the_last_number(text, expected):
    assert final_answer(text) == expected


@pytest.mark.parametrize("written", ["#### {}", "So \\boxed{{{}}}", "The answer is {}", "In all it makes {}"])
@pytest.mark.parametrize(
    ("number", "plain"),
    [("1,234,567.5", "1234567.5"), ("$12", "12"), ("$1,000.", "1000"), ("-$3", "-3"), ("-7.", "-7")],
)
def test_separators_currency_and_full_stop_go(written, number, plain):
    assert final_answer(written.format(number)) == plain


def test_commas_between_members_stay():
    assert final_answer("\\boxed{(1,234)}") == "(1,234)"
    assert final_answer("#### 5,6") == "5,6"
    assert final_answer("\\boxed{1{,}234}") == "1234"


@pytest.mark.parametrize("text", ["6 x 7 is 42 <<6*7=42>>", "42<<6*7=42>>, found in <<1+1=2>>so few steps"])
def test_calculator_notes_are_no_answers(text):
    assert final_answer(text) == "42"
    assert final_answer("#### 41<<40+1=41>>") == "41"


@given(st.text(), st.integers(0, 10**12), st.text(alphabet="abc \n,;"))
def test_a_mark_wins_over_whatever_stands_before_it(before, number, after):
    assert final_answer(f"{before}\n#### {number:,}\n{after}") == str(number)


@given(st.text(st.characters(blacklist_characters="#\\0123456789", blacklist_categories=["Nd"])), st.integers(0, 10**9))
def test_prose_around_a_number_changes_nothing(prose, number):
    assert final_answer(f"{prose.replace('answer', '')} {number} xyz") == str(number)


@pytest.mark.slow
@given(st.recursive(PIECES, lambda part: st.lists(part).map("".join).map("{{{}}}".format)))
def test_a_box_is_closed_by_its_own_brace(content):
    assert final_answer(f"So \\boxed{{a{content}b}} and {{more}}") == f"a{content}b"


@given(st.text(alphabet="#\\boxed{}answer is:.$<>0123456789,- \n"))
def test_no_text_is_too_odd(text):
    found = final_answer(text)
    assert found is None or (found and found == found.strip())
