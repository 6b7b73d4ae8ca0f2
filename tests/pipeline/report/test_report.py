import json
import re

import polars as pl
import pytest

from pipeline.errors import RequestError
from tests.pipeline.report.inputs import change_json, history_row, report, write_history, write_inputs
from tests.pipeline.report.pages import chart_data, words_of

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A report over two variants and two seeds."""
    root = write_inputs(tmp_path_factory.mktemp("report"))
    report(root)
    return root / "report"


@pytest.fixture
def inputs(tmp_path):
    return write_inputs(tmp_path, variants=["dpo"], seeds=[0])


def summary_of(root) -> dict:
    return json.loads((root / "report/summary.json").read_text())


def test_summary_holds_phase_1_cells_and_statistics_over_seeds(made):
    summary = json.loads((made / "summary.json").read_text())
    assert (summary["phase_1"]["rows_scored"], summary["phase_1"]["rows_reused"]) == (96, 1824)
    assert summary["phase_1"]["drift"]["per_sequence"]["p99"] == 7.9e-6
    assert list(summary["cells"]) == ["dpo-0", "dpo-1", "bdpo-0", "bdpo-1"]
    assert summary["cells"]["bdpo-1"]["evaluation"]["kl"] == 3.1
    accuracy = summary["variants"]["dpo"]["evaluation"]["rewards/accuracies"]
    assert accuracy["mean"] == pytest.approx(0.71)
    assert accuracy["standard_deviation"] == pytest.approx(0.02 / 2**0.5)  # the sample's, n - 1
    assert summary["variants"]["dpo"]["evaluation"]["expected_reward/policy"]["mean"] == pytest.approx(0.42)
    assert summary["reference"]["logps/accuracies"]["mean"] == pytest.approx(0.61)


def test_curves_hold_every_step_of_every_cell_digit_by_digit(inputs):
    row = history_row(1, 700, 0) | {"loss": "0.12345678901234567"}
    write_history(inputs / "results/dpo-0/history.tsv", [row, *(history_row(step, 700, 0) for step in range(2, 701))])
    report(inputs, variants=["dpo"], seeds=[0])
    curves = pl.read_csv(inputs / "report/curves.tsv", separator="\t", infer_schema=False)
    assert curves.columns[:6] == ["variant", "seed", "cell", "step", "epoch", "loss"]
    assert curves["step"].to_list() == [str(step) for step in range(1, 701)]
    assert curves["loss"][0] == "0.12345678901234567"
    assert curves["cell"].unique().to_list() == ["dpo-0"]


def test_page_thins_long_curves_to_means_over_the_whole_run(inputs):
    rows = [history_row(step, 5000, 0) for step in range(1, 5001)]
    write_history(inputs / "results/dpo-0/history.tsv", rows)
    data = chart_data(report(inputs, variants=["dpo"], seeds=[0]))
    table = data["tables"]["curves"]
    assert 200 <= len(table["rows"]) <= 500
    steps = [row[table["columns"].index("step")] for row in table["rows"]]
    assert steps[0] < 25
    assert steps[-1] > 4975
    assert steps == sorted(set(steps))
    # Means of equal stretches: a rising line stays the same line.
    margins = [row[table["columns"].index("rewards/margins")] for row in table["rows"]]
    assert margins == pytest.approx([step / 5000 for step in steps], abs=2e-4)


@pytest.mark.slow
def test_page_stays_small_however_many_cells_and_steps(tmp_path):
    variants = [f"v{index}" for index in range(12)]
    root = write_inputs(tmp_path, variants=variants, seeds=range(3), steps=1000)
    assert report(root, variants=variants, seeds=range(3)).stat().st_size < 3e6


def test_same_inputs_give_the_same_bytes(inputs):
    def bytes_of_report() -> dict:
        report(inputs, variants=["dpo"], seeds=[0])
        return {path.name: path.read_bytes() for path in (inputs / "report").iterdir()}

    first = bytes_of_report()
    assert sorted(first) == ["curves.tsv", "index.html", "summary.json", "table.md", "table.tex"]
    assert bytes_of_report() == first


def test_missing_cell_is_named_with_what_to_run_and_nothing_is_written(inputs):
    with pytest.raises(
        RequestError, match=r"dpo-1 \(dpo-1/history.tsv, dpo-1/train.json, evaluate/dpo-1.json\).*`dvc repro`"
    ):
        report(inputs, variants=["dpo"], seeds=[0, 1])
    (inputs / "results/evaluate/dpo-0.json").unlink()
    with pytest.raises(RequestError, match=r"dpo-0 \(evaluate/dpo-0.json\)"):
        report(inputs, variants=["dpo"], seeds=[0])
    assert not (inputs / "report").exists()


def test_folders_of_removed_cells_are_ignored(inputs):
    write_inputs(inputs, variants=["gone"], seeds=[0])
    page = report(inputs, variants=["dpo"], seeds=[0])
    assert "gone" not in page.read_text().replace("gone from", "")
    assert "gone" not in (inputs / "report/summary.json").read_text() + (inputs / "report/curves.tsv").read_text()


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("results/dpo-0/train.json", '{"steps": ', "train.json is not valid JSON"),
        ("results/evaluate/dpo-0.json", "[]", "dpo-0.json holds list"),
        ("results/dpo-0/history.tsv", "", "history.tsv"),
        ("results/dpo-0/history.tsv", "step\tloss\n", "history.tsv has columns .* and 0 rows"),
        ("results/dpo-0/history.tsv", "epoch\tloss\n1\t2\n", "column step"),
        ("results/dpo-0/history.tsv", "step\tloss\n1\tlow\n", "no number.*low"),
        ("results/score/metrics.json", None, "metrics.json does not exist.*dvc repro"),
    ],
)
def test_unreadable_input_is_one_clear_message(inputs, file, content, complaint):
    if content is None:
        (inputs / file).unlink()
    else:
        (inputs / file).write_text(content)
    with pytest.raises(RequestError, match=f"(?s){complaint}"):
        report(inputs, variants=["dpo"], seeds=[0])


def test_page_tells_what_ran(made):
    words = words_of(made / "index.html")
    assert "4 policies (2 variants × 2 seeds) trained on 1,834 preference pairs" in words
    assert "96 rows 1,411 tokens, 12.8 s, 1,321 tokens/s" in words
    assert "Reused from before 1,824 rows" in words
    assert "7.9 × 10⁻⁶ nats 99th percentile" in words
    assert "Flagged rows 1 of 64 sampled above 0.2500 nats" in words and "Rescored rows 1,207" in words
    assert "3f2a9c0d51b84e7790aa23c4d1e6f708" in words
    assert "71.0 ± 1.4 %" in words  # reward accuracy of dpo over two seeds
    assert "Degraded chosen responses" in words


def test_page_tells_auxdpos_weight_in_both_units_and_that_of_an_earlier_version_as_what_it_was(inputs):
    given = {"beta": 0.1, "null_weight": 20.0, "null_weight_absolute": None}
    weights = {"null_weight": 20.0, "null_weight_absolute": 0.952}
    change_json(inputs / "results/dpo-0/train.json", objective="auxdpo", hyperparameters=given, offsets=weights)
    page = words_of(report(inputs, variants=["dpo"], seeds=[0]))
    assert "beta 0.1, null_weight 20 (null_weight 20 is 0.952 absolute)" in page
    assert summary_of(inputs)["variants"]["dpo"]["training"]["offsets/null_weight_absolute"]["mean"] == 0.952
    change_json(inputs / "results/dpo-0/train.json", hyperparameters={"null_weight": 1.0}, offsets={"rms": 0.1})
    assert "null_weight 1 (of an earlier version: null_weight is absolute)" in words_of(
        report(inputs, variants=["dpo"], seeds=[0])
    )


def test_absent_figures_show_a_dash_and_no_chart(inputs):
    rows = [{"step": step, "loss": 0.5} for step in range(1, 4)]
    write_history(inputs / "results/dpo-0/history.tsv", rows)
    (inputs / "results/evaluate/dpo-0.json").write_text('{"variant": "dpo", "seed": 0, "pairs": 202}')
    (inputs / "results/dpo-0/train.json").write_text("{}")
    for name in ("data/prepared/summary.json", "results/sft/metrics.json", "results/score/metrics.json"):
        (inputs / name).write_text("{}")
    page = report(inputs, variants=["dpo"], seeds=[0])
    words = words_of(page)
    assert [chart["key"] for chart in chart_data(page)["charts"]] == ["loss"]
    assert "Drift per sequence – nats" in words
    assert "Training time –" in words
    assert not re.search(r"\b(None|nan|Undefined)\b", words)


def test_values_that_are_no_numbers_become_null_and_gaps(inputs):
    change_json(inputs / "results/evaluate/dpo-0.json", kl=float("nan"))
    rows = [history_row(step, 5, 0) | {"loss": value} for step, value in enumerate(["0.7", "nan", "inf", "0.5"], 1)]
    write_history(inputs / "results/dpo-0/history.tsv", rows)
    page = report(inputs, variants=["dpo"], seeds=[0])
    assert summary_of(inputs)["cells"]["dpo-0"]["evaluation"]["kl"] is None
    table = chart_data(page)["tables"]["curves"]
    assert [row[table["columns"].index("loss")] for row in table["rows"]] == [0.7, None, None, 0.5]
    assert "NaN" not in (inputs / "report/summary.json").read_text()


def test_a_single_seed_has_no_deviation(inputs):
    page = report(inputs, variants=["dpo"], seeds=[0])
    assert summary_of(inputs)["variants"]["dpo"]["evaluation"]["kl"]["standard_deviation"] is None
    assert " ± " not in words_of(page).partition("Words")[0].partition("Held-out results")[2]


def test_markup_in_data_is_escaped_everywhere(inputs):
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(2)><!--<b>"
    change_json(inputs / "results/evaluate/dpo-0.json", categories={hostile: {"pairs": 9, "rewards/accuracies": 0.5}})
    skipped = {"count": 1, "examples": [{"where": hostile, "reason": hostile}]}
    change_json(inputs / "data/prepared/summary.json", skipped_rows=skipped, category_counts={hostile: 3})
    change_json(inputs / "results/dpo-0/train.json", objective=hostile, hyperparameters={hostile: hostile})
    page = report(inputs, variants=["dpo"], seeds=[0], title=hostile, settings={hostile: hostile}).read_text()
    assert "alert(1)" in page  # shown as text
    assert not re.search(r"<script>alert|<img src=x|<!--<b", page)
    assert chart_data(inputs / "report/index.html")["tables"]["categories"]["rows"][0][1] == hostile


def test_links_are_relative_and_survive_odd_folder_names(tmp_path):
    page = report(write_inputs(tmp_path / "a #1", variants=["dpo"], seeds=[0]), variants=["dpo"], seeds=[0]).read_text()
    links = set(re.findall(r'href="([^"#]+)"', page))
    assert {"../results/dpo-0/history.tsv", "../results/dpo-0/train.json", "../results/evaluate/dpo-0.json"} <= links
    assert {"../models/policies/dpo-0", "../data/reference/logps", "curves.tsv"} <= links
    odd = report(tmp_path / "a #1", variants=["dpo"], seeds=[0], models=tmp_path / "m #2").read_text()
    assert 'href="../../m%20%232/dpo-0"' in odd


def test_page_refers_to_no_other_host(made):
    page = (made / "index.html").read_text()
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?:https?:)?//""", page)
    assert "default-src 'none'" in page  # and the browser would refuse
