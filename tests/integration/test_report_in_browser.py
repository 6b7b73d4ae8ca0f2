"""The report's page and the template of `dvc plots` in a real browser without a network: drawn, silent, inert."""

from pathlib import Path

import pytest

from pipeline.report.vega import write_plots_page
from tests.browser import Visit, needs_browser, press
from tests.pipeline.report.inputs import answer_row, change_json, report, write_answers, write_inputs, write_scores

pytestmark = [pytest.mark.slow, needs_browser]

# Marks with an extent: a line of at least one segment, a dot, a rule that is longer than nothing.
MARKS = """
[...document.querySelectorAll(".chart")].map((box) => {
  const drawn = [...box.querySelectorAll(".mark-line path, .mark-symbol path")]
    .filter((path) => /[LA]/.test(path.getAttribute("d") || ""));
  return [box.id, box.querySelector("svg") ? drawn.length : -1];
})
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return report(write_inputs(tmp_path_factory.mktemp("report")))


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A page with tasks, suites and the answers to three prompts, of which p1 changed most, and bdpo's p2."""
    root = write_scores(write_inputs(tmp_path_factory.mktemp("scored")))
    for cell, logps in (("dpo-0", (-11.0, -4.0, -10.0)), ("bdpo-0", (-11.0, -10.0, -6.0))):
        rows = [answer_row(f"p{index}", policy_logp=logp) for index, logp in enumerate(logps)]
        rows[0] |= {"text": "A Needle in hay"}
        write_answers(root / f"results/answers/{cell}/samples.parquet", rows)
    return report(root)


def troubles(visit: Visit, page: Path) -> list[str]:
    """What is wrong with an opened report: errors, requests, charts that are not drawn."""
    try:
        visit.evaluate("window.reportReady.then(() => true)")
    except RuntimeError as error:
        return [f"not ready: {error}", *visit.errors]
    marks = visit.evaluate(MARKS)
    found = [f"{chart} has {count} marks" for chart, count in marks if count < 1]
    found += [] if len(marks) >= 10 else [f"only {len(marks)} charts"]
    return found + visit.errors + visit.warnings + [f"request: {url}" for url in visit.requests if url != page.as_uri()]


def test_every_chart_is_drawn_without_an_error_a_warning_or_a_request(browser, page):
    visit = browser.open(page)
    assert troubles(visit, page) == []
    charts = visit.evaluate(MARKS)
    assert {"chart-rewards", "chart-logps", "chart-dcr", "chart-kl", "chart-reward", "chart-categories"} <= {
        chart for chart, _ in charts
    }


@pytest.mark.parametrize(
    ("old", "new", "noticed"),
    [
        ('"table": "curves"', '"table": "cells"', "chart-loss has 0 marks"),
        ("window.vegaEmbed=", "window.somethingElse=", "vegaEmbed is not defined"),
        ('<div class="chart"', '<img src="https://example.org/x.png"><div class="chart"', "example.org"),
    ],
)
def test_the_check_above_notices(browser, page, tmp_path, old, new, noticed):
    """A chart without data, a bundle without Vega, a page that asks the network."""
    text = page.read_text()
    assert old in text
    broken = tmp_path / "broken.html"
    broken.write_text(text.replace(old, new))
    assert any(noticed in trouble for trouble in troubles(browser.open(broken), broken))


def test_markup_in_names_stays_text(browser, tmp_path):
    hostile = "</script><script>window.harmed = 1</script><img src=x onerror='window.harmed = 1'>"
    root = write_inputs(tmp_path, variants=["dpo"], seeds=[0])
    categories = {hostile: {"pairs": 9, "rewards/accuracies": 0.5, "rewards/margins": 1.0, "dcr": 0.5}}
    statistic = {"value": 0.5, "standard_error": None, "low": 0.4, "high": 0.6}
    metrics = {hostile: statistic | {"higher_is_better": True}}
    suite = {"domain": hostile, "reward_accuracy": statistic, "categories": {hostile: {"reward_accuracy": statistic}}}
    change_json(
        root / "results/evaluate/dpo-0.json",
        categories=categories,
        tasks={hostile: {"samples": 1, "metrics": metrics, "reference": metrics}},
        suites={hostile: suite},
    )
    rows = [answer_row("p", prompt_text=hostile, text=hostile, author=author) for author in ("policy", "reference")]
    write_answers(root / "results/answers/dpo-0/samples.parquet", rows)
    change_json(root / "results/dpo-0/train.json", objective=hostile, hyperparameters={hostile: 1})
    change_json(root / "data/prepared/summary.json", category_counts={hostile: 9})
    page = report(root, variants=["dpo"], seeds=[0], title=hostile, settings={hostile: hostile})
    visit = browser.open(page)
    assert troubles(visit, page) == []
    assert visit.evaluate("[document.title, window.harmed ?? null]") == [hostile, None]
    assert visit.evaluate("document.images.length") == 0
    labels = "[...document.querySelectorAll('#chart-categories svg text')].map((text) => text.textContent)"
    assert any(label.startswith("</script><script>") for label in visit.evaluate(labels))


def test_legend_hides_a_variant_in_every_chart(browser, page):
    visit = browser.open(page)
    assert troubles(visit, page) == []
    before = dict(visit.evaluate(MARKS))
    visit.evaluate("document.querySelector('.legend button[data-variant=bdpo]').click()")
    visit.evaluate("new Promise((resume) => requestAnimationFrame(() => requestAnimationFrame(resume)))")
    after = dict(visit.evaluate(MARKS))
    assert after == {chart: count / 2 for chart, count in before.items()}
    pressed = "[...document.querySelectorAll('.legend button')].map((button) => button.ariaPressed)"
    assert visit.evaluate(pressed) == ["true", "false"] * 2


def test_pointing_at_a_curve_reads_off_every_variant(browser, page):
    visit = browser.open(page)
    assert troubles(visit, page) == []
    visit.evaluate("document.getElementById('figure-margins').scrollIntoView()")
    place = "(({ x, y, width, height }) => [x + width / 2, y + height / 2])"
    x, y = visit.evaluate(f"{place}(document.querySelector('#chart-margins svg').getBoundingClientRect())")
    for dx in (0, 2):
        browser.call("Input.dispatchMouseEvent", visit.session, type="mouseMoved", x=x + dx, y=y)
    visit.wait_until("document.querySelector('#vg-tooltip-element.visible')")
    words = visit.evaluate("document.getElementById('vg-tooltip-element').innerText").split()
    step = int(words[words.index("step") + 1])
    assert 15 <= step <= 25
    # The margins of the made-up histories: step / 40 and twice that.
    assert float(words[words.index("dpo") + 1]) == pytest.approx(step / 40)
    assert float(words[words.index("bdpo") + 1]) == pytest.approx(step / 20)


def test_clicking_a_heading_sorts_by_value_and_keeps_the_reference_on_top(browser, page):
    visit = browser.open(page)
    order = "[...document.querySelectorAll('#results tbody th[scope=row]')].slice(0, 3).map((th) => th.textContent)"
    click = "[...document.querySelectorAll('#results th button')].find((b) => b.textContent == 'KL').click()"
    visit.evaluate(f"{click}; {click}")
    assert visit.evaluate(order) == ["reference", "bdpo", "dpo"]
    visit.evaluate(click)
    assert visit.evaluate(order) == ["reference", "dpo", "bdpo"]


def test_charts_of_tasks_are_drawn_and_hidden_with_their_variant(browser, scored):
    visit = browser.open(scored)
    assert troubles(visit, scored) == []
    before = dict(visit.evaluate(MARKS))
    assert (before["chart-task-0"], before["chart-task-1"]) == (2, 2)
    visit.evaluate("document.querySelector('#tasks .legend button[data-variant=bdpo]').click()")
    visit.evaluate("new Promise((resume) => requestAnimationFrame(() => requestAnimationFrame(resume)))")
    assert dict(visit.evaluate(MARKS))["chart-task-0"] == 1
    dashed = "document.querySelectorAll('#chart-task-0 svg line[stroke-dasharray=\"4,4\"]').length"
    assert visit.evaluate(dashed) == 1  # the reference stays


def test_tasks_are_sorted_from_the_keyboard_and_say_so(browser, scored):
    visit = browser.open(scored)
    head = "[...document.querySelectorAll('#tasks thead th')].find((th) => th.textContent == 'bdpo')"
    order = "[...document.querySelectorAll('#tasks tbody th')].map((th) => th.textContent)"
    visit.evaluate(
        "[...document.querySelectorAll('#tasks thead th')].find((th) => th.textContent == 'dpo')"
        ".querySelector('button').focus()"
    )
    press(browser, visit, "Tab", 9)
    assert visit.evaluate("document.activeElement.textContent") == "bdpo"
    for direction, names in (
        ("ascending", ["gsm8k_cot_4shot", "wikitext"]),
        ("descending", ["wikitext", "gsm8k_cot_4shot"]),
    ):
        press(browser, visit, "Enter", 13, "\r")
        assert visit.evaluate(f"{head}.getAttribute('aria-sort')") == direction
        assert visit.evaluate(order) == names
    assert visit.evaluate("document.querySelectorAll('#tasks [aria-sort]').length") == 1


def test_answers_are_ordered_bounded_and_searched(browser, scored):
    visit = browser.open(scored)
    assert visit.errors == []
    assert visit.evaluate("document.getElementById('answer-controls').offsetHeight > 0")
    shown = (
        "[...document.querySelectorAll('#answer-list > details')].filter((prompt) => prompt.offsetHeight)"
        ".map((prompt) => prompt.querySelector('summary').textContent.slice(9, 11))"
    )
    count = "document.getElementById('answer-count').textContent"

    def enter(name: str, value: str) -> list[str]:
        visit.evaluate(
            f"(() => {{ const control = document.getElementById('answer-{name}'); control.value = '{value}';"
            "control.dispatchEvent(new Event('input', { bubbles: true })); })()"
        )
        return visit.evaluate(shown)

    assert visit.evaluate(shown) == ["p1", "p2", "p0"]
    assert enter("order", "2") == ["p2", "p1", "p0"]  # by bdpo's
    assert enter("least", "0.2") == ["p2", "p1"]
    assert enter("order", "0") == ["p1", "p2"]
    assert visit.evaluate(count) == "2 of 3 shown"
    assert enter("search", "NEEDLE") == []
    assert enter("least", "0") == ["p0"]
    assert enter("search", "") == ["p1", "p2", "p0"]


def test_a_table_is_copied_as_the_file_has_it(browser, scored):
    visit = browser.open(scored)
    visit.evaluate("document.querySelector('#paper details').open = true")
    browser.allow_clipboard()
    browser.call("Page.bringToFront", visit.session)
    visit.evaluate("document.querySelector('[data-of=paste-latex]').focus()")
    press(browser, visit, "Enter", 13, "\r")
    visit.wait_until("document.querySelector('[data-of=paste-latex]').textContent == 'Copied'")
    assert visit.evaluate("navigator.clipboard.readText()") == (scored.parent / "table.tex").read_text()
    assert visit.errors == []


def test_without_a_clipboard_the_table_is_selected(browser, scored):
    visit = browser.open(scored)
    visit.evaluate("document.querySelector('#paper details').open = true")
    visit.evaluate(
        "Object.defineProperty(navigator, 'clipboard', { value: undefined }); document.execCommand = () => false"
    )
    visit.evaluate("document.querySelector('[data-of=paste-markdown]').click()")
    label = "document.querySelector('[data-of=paste-markdown]').textContent"
    assert visit.evaluate(label) == "Selected: copy it now"
    assert visit.evaluate("getSelection().toString()").strip() == (scored.parent / "table.md").read_text().strip()


def test_dvc_plots_are_drawn_offline_with_the_page_template(browser, tmp_path):
    from dvc_render import VegaRenderer, render_html

    template = write_plots_page(tmp_path / "plots/offline.html")
    points = [{"step": str(step), "logps/chosen": str(-20.0 - step), "rev": "workspace"} for step in range(5)]
    charts = [
        VegaRenderer([dict(point) for point in points], name, x="step", y="logps/chosen", template=name)
        for name in ("linear", "simple", "scatter")
    ]
    page = Path(render_html(charts, tmp_path / "out/index.html", html_template=template))
    visit = browser.open(page)
    drawn = "['linear', 'simple', 'scatter'].every((id) => document.getElementById(id).querySelector('svg'))"
    visit.wait_until(drawn)
    assert visit.evaluate("document.querySelector('#simple .mark-line path').getAttribute('d').includes('L')")
    assert (visit.errors, visit.requests) == ([], [page.as_uri()])
