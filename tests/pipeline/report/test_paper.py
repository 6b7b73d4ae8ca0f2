"""The tables to paste, parsed and compared with summary.json."""

import html
import json
import re

import pytest

from tests.pipeline.report.inputs import change_json, report, write_inputs, write_scores

HEADINGS = [
    "reward accuracy, %",
    "margin",
    "KL",
    "expected reward",
    "gsm8k_cot_4shot, exact_match (strict-match), %",
    "wikitext, word_perplexity",
    "held_out, reward accuracy, %",
    "rewardbench2, reward accuracy, %",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = write_scores(write_inputs(tmp_path_factory.mktemp("report"), steps=3))
    report(root)
    return root / "report"


def markdown(folder) -> list[list[str]]:
    """Rows of cells, unescaped; bold stays as two asterisks."""
    lines = [line for line in (folder / "table.md").read_text().splitlines() if line.startswith("|")]
    assert re.fullmatch(r"\| --- \|( ---: \|)+", lines.pop(1))
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    return [[html.unescape(re.sub(r"\\(.)", r"\1", cell.strip())) for cell in row] for row in rows]


def latex(folder) -> list[list[str]]:
    """Rows of cells with LaTeX's commands undone, bold as in Markdown."""
    text = (folder / "table.tex").read_text()
    columns = re.search(r"\\begin\{tabular\}\{(l(r+))\}\n\\toprule\n", text)[2]
    body = text.partition("\\toprule\n")[2].partition("\\bottomrule\n\\end{tabular}\n")[0]
    rows = [line.removesuffix(r" \\") for line in body.splitlines() if line != r"\midrule"]
    cells = [re.split(r"(?<!\\)&", row) for row in rows]
    assert {len(row) for row in cells} == {len(columns) + 1}
    return [[plain(cell.strip()) for cell in row] for row in cells]


def plain(cell: str) -> str:
    """The cell as it is printed; fails where a sign that means something to LaTeX is left bare."""
    bare = re.sub(r"\\[&%$#_{}]|\$\\pm\$|\$-\$|\\text[a-z]+\{\}|\\textbf\{[\d.]+\}", "", cell)
    assert not set(bare) & set("&%$#_{}~^\\"), cell
    cell = re.sub(r"\\textbf\{(.*?)\}", r"**\1**", cell).replace(r"$\pm$", "±").replace("$-$", "-").replace("--", "–")
    for command, sign in (("textbackslash", "\\"), ("textasciitilde", "~"), ("textasciicircum", "^")):
        cell = cell.replace(rf"\{command}{{}}", sign)
    for command, sign in (("textless", "<"), ("textgreater", ">"), ("textbar", "|")):
        cell = cell.replace(rf"\{command}{{}}", sign)
    return re.sub(r"\\([&%$#_{}])", r"\1", cell)


READ = {"markdown": markdown, "latex": latex}


def expected(summary: dict) -> dict[str, list[tuple | None]]:
    """{row: (mean, deviation) of each of HEADINGS}, read from summary.json."""

    def pair(statistic, *, deviation=True):
        return (statistic["mean"], statistic["standard_deviation"] if deviation else None)

    task, metric = "gsm8k_cot_4shot", "exact_match,strict-match"
    rows = {}
    for variant, figures in summary["variants"].items():
        evaluation, tasks, suites = figures["evaluation"], figures["tasks"], figures["suites"]
        names = ("rewards/accuracies", "rewards/margins", "kl", "expected_reward/policy")
        rows[variant] = [pair(evaluation[name]) for name in names]
        rows[variant] += [
            pair(tasks[task]["metrics"][metric]),
            pair(tasks["wikitext"]["metrics"]["word_perplexity,none"]),
            *(pair(suites[suite]["reward_accuracy"]) for suite in ("held_out", "rewardbench2")),
        ]
    reference = summary["reference"]
    tasks = reference["tasks"]
    rows["reference"] = [
        *(None, None, None, pair(reference["expected_reward"], deviation=False)),
        pair(tasks[task]["metrics"][metric], deviation=False),
        pair(tasks["wikitext"]["metrics"]["word_perplexity,none"], deviation=False),
        *(None, None),
    ]
    return rows


@pytest.mark.parametrize("form", READ)
def test_every_number_is_that_of_the_summary(made, form):
    head, *rows = READ[form](made)
    assert head == ["variant", *HEADINGS]
    assert [row[0] for row in rows] == ["reference", "dpo", "bdpo"]
    wanted = expected(json.loads((made / "summary.json").read_text()))
    for name, *cells in rows:
        for heading, cell, figures in zip(HEADINGS, cells, wanted[name], strict=True):
            if figures is None:
                assert cell == "–", (name, heading)
                continue
            shown = cell.replace("*", "").split(" ± ")
            scale = 100 if heading.endswith("%") else 1
            exact = [scale * figure for figure in figures if figure is not None]
            half = 0.5001 * 10 ** -len(shown[0].partition(".")[2])  # of a unit of the last digit
            assert half < 0.06 and [float(part) for part in shown] == pytest.approx(exact, abs=half), (name, heading)


@pytest.mark.parametrize("form", READ)
def test_the_best_of_a_column_is_bold_and_ties_are_both(made, form):
    rows = READ[form](made)[1:]
    bold = {
        heading: [row[0] for row in rows if row[column].startswith("**")] for column, heading in enumerate(HEADINGS, 1)
    }
    assert bold == {
        "reward accuracy, %": ["bdpo"],
        "margin": ["dpo", "bdpo"],
        "KL": ["dpo"],  # lower is better
        "expected reward": ["bdpo"],
        "gsm8k_cot_4shot, exact_match (strict-match), %": ["bdpo"],
        "wikitext, word_perplexity": ["reference"],  # lower is better, and the reference takes part
        "held_out, reward accuracy, %": ["bdpo"],
        "rewardbench2, reward accuracy, %": ["bdpo"],
    }


@pytest.mark.parametrize("form", READ)
def test_odd_names_survive_and_break_no_table(tmp_path, form):
    odd = "50%_a&b #1 {x} $y$ ~z^ \\w <i> | *c*"
    root = write_inputs(tmp_path, variants=["dpo"], seeds=[0], steps=3)
    task = {"samples": 2, "metrics": {"acc,none": {"value": 0.5, "standard_error": 0.1, "higher_is_better": True}}}
    change_json(root / "results/evaluate/dpo-0.json", tasks={odd: task})
    report(root, variants=["dpo"], seeds=[0])
    head, reference, row = READ[form](root / "report")
    assert head[-1] == f"{odd}, acc, %"
    assert (reference[-1], row[-1]) == ("–", "50.0")  # one seed: no deviation; nothing to be best of


def test_columns_without_a_figure_are_left_out(tmp_path):
    root = write_inputs(tmp_path, variants=["dpo"], seeds=[0], steps=3)
    change_json(root / "results/evaluate/dpo-0.json", expected_reward=None, kl=None, **{"rewards/margins": -0.25})
    report(root, variants=["dpo"], seeds=[0])
    for read in READ.values():
        assert read(root / "report") == [
            ["variant", "reward accuracy, %", "margin"],
            ["reference", "–", "–"],
            ["dpo", "70.0", "-0.250"],
        ]


def test_the_page_shows_the_files_as_they_are(made):
    page = (made / "index.html").read_text()
    for language, file in (("markdown", "table.md"), ("latex", "table.tex")):
        shown = re.search(rf'<pre id="paste-{language}"[^>]*>(.*?)</pre>', page, re.DOTALL)[1]
        assert html.unescape(shown) == (made / file).read_text()
