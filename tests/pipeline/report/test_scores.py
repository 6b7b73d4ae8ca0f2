"""Benchmark tasks and preference suites: averaged over seeds in summary.json, and shown."""

import json

import pytest

from pipeline.report.drawings import TASK_CHARTS
from tests.pipeline.report.inputs import change_json, report, tasks, write_inputs, write_scores
from tests.pipeline.report.pages import chart_data, tables_in, words_of

pytestmark = pytest.mark.filterwarnings("error")
PANELS = ("tasks", "suites", "answers", "paper")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A report with tasks and suites over two variants and two seeds."""
    return report(write_scores(write_inputs(tmp_path_factory.mktemp("report"))))


@pytest.fixture
def one(tmp_path):
    """Inputs of one policy."""
    return write_scores(write_inputs(tmp_path, variants=["dpo"], seeds=[0], steps=3), variants=["dpo"], seeds=[0])


def summary_of(page) -> dict:
    return json.loads((page.parent / "summary.json").read_text())


def rows_of(table) -> dict[str, list[str]]:
    return {row[0]: row[1:] for row in table}


def test_summary_averages_tasks_over_seeds_and_keeps_the_error_within_one(made):
    summary = summary_of(made)
    task = summary["variants"]["bdpo"]["tasks"]["gsm8k_cot_4shot"]
    metric = task["metrics"]["exact_match,strict-match"]
    assert task["samples"] == 20
    assert metric["mean"] == pytest.approx(0.46)
    assert metric["standard_deviation"] == pytest.approx(0.02 / 2**0.5)  # the sample's, n - 1
    assert metric["standard_error"] == pytest.approx(((0.03**2 + 0.04**2) / 2) ** 0.5)
    assert (metric["seeds"], metric["higher_is_better"]) == (2, True)
    perplexity = summary["variants"]["bdpo"]["tasks"]["wikitext"]["metrics"]["word_perplexity,none"]
    assert (perplexity["standard_error"], perplexity["higher_is_better"]) == (None, False)
    reference = summary["reference"]["tasks"]["gsm8k_cot_4shot"]["metrics"]["exact_match,strict-match"]
    assert (reference["mean"], reference["standard_error"]) == (pytest.approx(0.3), pytest.approx(0.025))


def test_summary_averages_suites_and_their_categories_over_seeds(made):
    summary = summary_of(made)
    suite = summary["variants"]["bdpo"]["suites"]["rewardbench2"]
    assert (suite["domain"], suite["pairs"], suite["prompts"], suite["rows"]) == ("out", 300, 100, 100)
    accuracy = suite["reward_accuracy"]
    assert accuracy["mean"] == pytest.approx(0.66)  # 0.65 and 0.67
    assert accuracy["standard_deviation"] == pytest.approx(0.02 / 2**0.5)
    assert (accuracy["low"], accuracy["high"]) == (pytest.approx(0.62), pytest.approx(0.70))
    assert (accuracy["standard_error"], accuracy["seeds"]) == (pytest.approx(0.02), 2)
    focus = suite["categories"]["Focus"]
    assert (focus["rows"], focus["best_of_reward"]["mean"]) == (11, pytest.approx(0.49))
    reference = summary["reference"]["suites"]["rewardbench2"]
    assert reference["token_logp_accuracy"]["mean"] == pytest.approx(0.5)
    assert "reward_accuracy" not in reference


def test_tasks_show_the_reference_first_then_deviations_over_seeds(made):
    head, *rows = tables_in(made, "tasks")[0]
    assert head == ["task", "metric", "samples", "reference", "dpo", "bdpo"]
    shown = [[cell.replace("\n", " ").strip() for cell in row] for row in rows]
    assert shown[0] == [
        "gsm8k_cot_4shot", "exact_match (strict-match)", "20", "30.0 ± 2.5 %", "36.0 ± 1.4 %", "46.0 ± 1.4 %",
    ]  # fmt: skip
    assert shown[1][3:] == ["11.00", "12.5 ± 0.0", "11.5 ± 0.0"]  # a perplexity is no share


def test_a_single_seed_of_a_task_has_its_own_standard_error(one):
    page = report(one, variants=["dpo"], seeds=[0])
    assert tables_in(page, "tasks")[0][1][4] == "35.0 ± 3.0 %"


def test_every_metric_of_a_task_has_a_chart_with_the_reference(made):
    data = chart_data(made)
    charts = {chart["key"]: chart for chart in data["charts"]}
    assert {"task-0", "task-1"} <= charts.keys()
    table = data["tables"]["tasks"]
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    first = next(row for row in rows if (row["chart"], row["variant"]) == (0, "bdpo"))
    deviation = 0.02 / 2**0.5
    bounds = (first["low"], first["high"], first["reference_low"], first["reference_high"])
    assert bounds == pytest.approx((0.46 - deviation, 0.46 + deviation, 0.275, 0.325))
    assert (first["value"], first["reference"]) == pytest.approx((0.46, 0.3))
    assert set(charts["task-0"]["columns"]) == set(table["columns"])


def test_hundreds_of_metrics_make_one_table_and_few_charts(one):
    metrics = {f"metric-{index}": {"value": 0.5, "standard_error": None} for index in range(TASK_CHARTS + 5)}
    change_json(one / "results/evaluate/dpo-0.json", tasks={"many": {"samples": 3, "metrics": metrics}})
    page = report(one, variants=["dpo"], seeds=[0])
    assert len(tables_in(page, "tasks")[0]) == 1 + TASK_CHARTS + 5
    assert sum(chart["key"].startswith("task-") for chart in chart_data(page)["charts"]) == TASK_CHARTS
    assert f"The first {TASK_CHARTS} of {TASK_CHARTS + 5} metrics" in words_of(page)


def test_suites_are_columns_by_domain_with_intervals_and_changes(made):
    reward, token, best, categories = tables_in(made, "suites")
    assert [table[0] for table in (reward, token, best)] == [["variant", "in domain", "out of domain"]] * 3
    assert [name.split()[0] for name in reward[1]] == ["held_out", "rewardbench2"]
    assert rows_of(reward)["bdpo"] == ["76.0 ± 1.4 % 72.0–80.0 %", "66.0 ± 1.4 % 62.0–70.0 %"]
    assert "reference" not in rows_of(reward)  # its implicit reward is zero everywhere
    assert rows_of(token)["reference"][1] == "50.0 % 46.0–54.0 %"
    assert rows_of(token)["dpo"][1] == "63.0 ± 1.4 % 59.0–67.0 %, +13.0 points"
    assert rows_of(best)["dpo"][0] == "74.0 ± 1.4 % 70.0–78.0 %"
    assert rows_of(categories)["Focus"] == [
        "11",
        *("41.0 43.0 44.0 46.0 48.0 49.0".replace(" ", " ± 1.4 %,") + " ± 1.4 %").split(","),
    ]


def test_a_suite_that_only_some_variants_have_shows_a_dash_for_the_others(tmp_path):
    root = write_scores(write_inputs(tmp_path, seeds=[0], steps=3), variants=["dpo"], seeds=[0])
    page = report(root, seeds=[0])
    assert tables_in(page, "tasks")[0][1][4:] == ["35.0 ± 3.0 %", "–"]
    assert rows_of(tables_in(page, "suites")[0])["bdpo"] == ["– –", "– –"]
    assert "None" not in words_of(page) and "Undefined" not in words_of(page)


def test_without_scores_neither_page_nor_summary_mentions_them(tmp_path):
    page = report(write_inputs(tmp_path, variants=["dpo"], seeds=[0], steps=3), variants=["dpo"], seeds=[0])
    text = page.read_text()
    assert not any(f'id="{panel}"' in text or f'href="#{panel}"' in text for panel in PANELS)
    assert "tasks" not in chart_data(page)["tables"]
    summary = summary_of(page)
    assert not {"tasks", "suites"} & (summary["reference"].keys() | summary["variants"]["dpo"].keys())


def test_a_metric_below_one_whose_lower_is_better_is_no_share(one):
    metric = {"bits_per_byte,none": {"value": 0.81, "standard_error": 0.02, "higher_is_better": False}}
    change_json(one / "results/evaluate/dpo-0.json", tasks={"wikitext": {"samples": 62, "metrics": metric}})
    page = report(one, variants=["dpo"], seeds=[0])
    assert tables_in(page, "tasks")[0][1][1:] == ["bits_per_byte lower is better", "62", "–", "0.810 ± 0.020"]


def test_a_seed_without_a_number_does_not_count(tmp_path):
    root = write_scores(write_inputs(tmp_path, variants=["dpo"], steps=3), variants=["dpo"])
    changed = tasks(0, 0)
    changed["gsm8k_cot_4shot"]["metrics"]["exact_match,strict-match"]["value"] = float("nan")
    change_json(root / "results/evaluate/dpo-0.json", tasks=changed)
    summary = summary_of(report(root, variants=["dpo"]))
    metric = summary["variants"]["dpo"]["tasks"]["gsm8k_cot_4shot"]["metrics"]["exact_match,strict-match"]
    assert (metric["mean"], metric["standard_deviation"], metric["seeds"]) == (pytest.approx(0.37), None, 1)


def test_values_that_are_no_numbers_leave_a_dash(one):
    changed = tasks(0, 0)
    changed["gsm8k_cot_4shot"]["metrics"]["exact_match,strict-match"]["value"] = float("nan")
    changed["gsm8k_cot_4shot"]["metrics"]["acc,none"] = {"value": 0.25, "standard_error": float("inf")}
    change_json(one / "results/evaluate/dpo-0.json", tasks=changed)
    page = report(one, variants=["dpo"], seeds=[0])
    table = tables_in(page, "tasks")[0]
    assert [row[1] for row in table[1:]] == ["acc", "word_perplexity lower is better"]
    assert table[1][3:] == ["–", "25.0 %"]
    assert "NaN" not in (page.parent / "summary.json").read_text()
