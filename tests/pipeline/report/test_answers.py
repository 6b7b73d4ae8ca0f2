"""The reader of sampled answers."""

import re

import polars as pl
import pytest

from pipeline.errors import RequestError
from pipeline.report.answers import ANSWERS, CHARACTERS, PROMPTS, read_answers, reward_beta
from tests.pipeline.report.inputs import answer_row, change_json, report, write_answers, write_inputs
from tests.pipeline.report.pages import words_of

pytestmark = pytest.mark.filterwarnings("error")


def write(root, cell, rows):
    write_answers(root / "results/answers" / cell / "samples.parquet", rows)


def read(root, *cells, beta=0.1):
    return read_answers(root / "results/answers", dict.fromkeys(cells, beta))


@pytest.fixture
def inputs(tmp_path):
    return write_inputs(tmp_path, steps=3)


def test_each_policy_reads_the_reference_s_answer_beside_its_own(tmp_path):
    theirs = answer_row("p", author="reference", text="shared", policy_logp=-11.0, reference_logp=-9.0, n_tokens=4)
    write(tmp_path, "dpo-0", [answer_row("p", true_reward=0.7), theirs])
    write(tmp_path, "bdpo-0", [answer_row("p", text="other", policy_logp=-13.0), theirs | {"policy_logp": -8.0}])
    reader = read_answers(tmp_path / "results/answers", {"dpo-0": 0.1, "bdpo-0": None})
    (prompt,) = reader.prompts
    (shared,) = prompt.reference
    assert {cell: (found.log_ratio, found.reward) for cell, found in shared.readings.items()} == {
        "dpo-0": (-2.0, pytest.approx(-0.2)),
        "bdpo-0": (1.0, None),
    }
    (own,) = prompt.policies["dpo-0"]
    assert (own.text, own.true_reward, own.reference_logp) == ("policy on p", 0.7, -12.0)
    assert own.readings["dpo-0"].reward == pytest.approx(0.2)
    assert own.readings["dpo-0"].change == pytest.approx(0.2)  # 2 nats over 10 tokens
    assert prompt.changes == {"dpo-0": pytest.approx(0.5), "bdpo-0": pytest.approx(0.25)}
    assert prompt.change == pytest.approx(0.5)


def test_the_prompts_that_changed_most_per_token_are_kept_in_that_order(tmp_path):
    rows = [answer_row(f"p{i}", policy_logp=-12.0 - i % 50, n_tokens=10 if i < 50 else 100) for i in range(100)]
    write(tmp_path, "dpo-0", rows)
    reader = read(tmp_path, "dpo-0")
    assert reader.total == 100
    assert [prompt.text for prompt in reader.prompts] == [f"Question p{49 - i}?" for i in range(PROMPTS)]


@pytest.mark.slow
def test_of_many_answers_and_long_texts_the_page_says_what_it_leaves_out(inputs):
    rows = [answer_row("p", sample=i, text=f"answer {i} " + "y" * 9000, policy_logp=-12.0 - i) for i in range(9)]
    write(inputs, "dpo-0", rows)
    page = report(inputs)
    words = words_of(page)
    shown = re.findall(r"answer (\d) y", words)
    assert shown == [str(9 - ANSWERS + i) for i in range(ANSWERS)]
    assert f"Of each author the {ANSWERS} answers" in words
    assert f"({9009 - CHARACTERS:,} more characters)" in words
    assert "y" * (CHARACTERS + 1) not in words


def test_page_shows_the_first_seed_of_every_variant_and_who_has_none(inputs):
    write(inputs, "dpo-0", [answer_row("p", text="of the first seed")])
    write(inputs, "dpo-1", [answer_row("p", text="of the second seed")])
    words = words_of(report(inputs))
    assert "of the first seed" in words and "of the second seed" not in words
    assert "No answers for bdpo-0." in words
    assert "reward 0.2000, log p −10.00, reference −12.00" in words
    assert 'href="../results/answers/dpo-0/samples.parquet"' in (inputs / "report/index.html").read_text()


def test_page_says_how_many_prompts_it_holds(inputs):
    write(inputs, "dpo-0", [answer_row(f"p{i}") for i in range(PROMPTS + 3)])
    page = report(inputs)
    assert f"The {PROMPTS} of {PROMPTS + 3} prompts" in words_of(page)
    assert page.read_text().count('class="card prompt"') == PROMPTS


def test_without_a_known_beta_the_log_ratio_is_shown_in_nats(inputs):
    change_json(inputs / "results/dpo-0/train.json", hyperparameters={"margin": 1.0})
    write(inputs, "dpo-0", [answer_row("p")])
    words = words_of(report(inputs))
    assert "log-ratio 2.000 nats, log p −10.00" in words
    assert "Where β is not known" in words


@pytest.mark.parametrize(
    ("hyperparameters", "beta"),
    [
        ({"beta": 0.1}, 0.1),
        ({"beta": 2}, 2.0),
        ({"terms": [{"weight": 1.0, "hyperparameters": {}}, {"weight": 0.5, "hyperparameters": {"beta": 0.3}}]}, 0.3),
        ({"margin": 1.0}, None),
        ({}, None),
        (None, None),
    ],
)
def test_beta_is_the_objective_s_or_that_of_its_first_term_with_one(hyperparameters, beta):
    assert reward_beta(hyperparameters) == beta


def test_values_that_are_not_there_are_dashes_and_come_last(inputs):
    rows = [answer_row("p", policy_logp=None), answer_row("q"), answer_row("r", reference_logp=float("nan"))]
    write(inputs, "dpo-0", [*rows, answer_row("s", n_tokens=0, policy_logp=-12.0, text="")])
    page = report(inputs)
    assert read(inputs, "dpo-0").prompts[0].text == "Question q?"
    words = words_of(page)
    assert "reward –, log p –" in words
    assert not re.search(r"\b(None|nan|NaN|Undefined)\b", words)


def test_answers_and_prompts_are_escaped(inputs):
    hostile = "</p></script><script>alert(1)</script><img src=x onerror=alert(2)><!--\" onclick='alert(3)'"
    write(inputs, "dpo-0", [answer_row("p", prompt_text=hostile, text=hostile)])
    page = report(inputs).read_text()
    assert page.count("alert(1)") >= 3  # in the heading, as the prompt, as the answer
    assert not re.search(r"<script>alert|<img src=x|<!--\"|\" onclick", page)


def test_without_files_there_is_no_reader(inputs):
    assert read(inputs, "dpo-0") is None
    write(inputs, "dpo-0", [])
    assert read(inputs, "dpo-0") is None
    assert 'id="answers"' not in report(inputs).read_text()


@pytest.mark.parametrize("damage", ["bytes", "column", "type"])
def test_an_unreadable_file_is_one_clear_message(inputs, damage):
    path = inputs / "results/answers/dpo-0/samples.parquet"
    write(inputs, "dpo-0", [answer_row("p")])
    if damage == "bytes":
        path.write_bytes(b"PAR1 and nothing else")
    elif damage == "column":
        pl.read_parquet(path).drop("n_tokens").write_parquet(path)
    else:
        pl.read_parquet(path).with_columns(policy_logp=pl.lit("low")).write_parquet(path)
    with pytest.raises(RequestError, match=r"samples.parquet is no table of sampled answers.*dvc repro -f evaluate"):
        report(inputs)
    assert not (inputs / "report").exists()
