"""The page of `refcache browse` in a real browser, opened from the disk: found, ordered, read, and inert."""

import json

import numpy as np
import pytest

from cache import prompt_key
from pipeline.model.tokenizer import END
from tests.browser import needs_browser, press
from tests.pipeline.browse.inputs import Inputs, write_samples

pytestmark = [pytest.mark.slow, needs_browser]

HARM = "</script><script>window.harmed = 1</script><img src=x onerror='window.harmed = 1'>"
HOSTILE = f"{HARM}\u2028\u2029\u202e desrever \" ' ` ${{1}} \\u003c & &lt; 👩‍🚀 日本語"

PAIRS = [
    ("what is 1+1?", "it is 2\n\nyes", "it is 3", {"category": "sums", "split": "test"}),
    ("what is 1+1?", "it is 3", "unscored", {"category": "sums", "split": "test"}),
    (f"prompt {HOSTILE}", f"good {HOSTILE}", f"bad {HOSTILE}", {"category": HOSTILE, "source": HOSTILE}),
    ("another", "it is 2\n\nyes", "Needle in hay", {}),
    *((f"prompt {i}", f"a good answer {'so ' * (i % 7)}{i}", f"bad {i}", {"category": "many"}) for i in range(4, 120)),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    made = Inputs(tmp_path_factory.mktemp("browse"), PAIRS, unscored={"unscored"})
    asked = {"prompt_key": prompt_key(made.ids("what is 1+1?")), "n_tokens": 3, "true_reward": 0.5}
    rows = [
        asked | {"author": author, "text": f"{author} {HOSTILE}", "policy_logp": -2.5, "reference_logp": -4.0}
        for author in ("policy", "reference")
    ]
    made.browse(answers=write_samples(made.root / "answers", "dpo-0", rows))
    return made


@pytest.fixture
def visit(browser, inputs):
    return at(browser, inputs, "")


def at(browser, inputs, fragment):
    opened = browser.open(inputs.root / "browse/index.html", fragment)
    opened.wait_until(
        "document.querySelector('#pair h2') || /not on/.test(document.getElementById('pair').textContent)"
    )
    return opened


def enter(visit, expected: int, **values) -> list[int]:
    """Set controls by id; the pairs of the first page once `expected` are found."""
    for name, value in values.items():
        visit.evaluate(
            f"(() => {{ const control = document.getElementById({json.dumps(name.replace('_', '-'))});"
            f"control[control.type === 'checkbox' ? 'checked' : 'value'] = {json.dumps(value)};"
            "control.dispatchEvent(new Event('input', { bubbles: true })); })()"
        )
    visit.wait_until(f"document.getElementById('state').textContent.startsWith('{expected} of 120 ')")
    return visit.evaluate("[...document.querySelectorAll('#rows th')].map((head) => Number(head.textContent))")


def shown_pair(visit, pair: int) -> None:
    visit.wait_until(f"document.querySelector('#pair h2')?.textContent === 'Pair {pair}'")


def test_it_opens_silently_and_asks_for_nothing_but_its_own_files(visit, inputs):
    shown_pair(visit, 0)
    assert visit.errors + visit.warnings == []
    own = (inputs.root / "browse").as_uri()
    assert len(visit.requests) == 8 and all(
        url.startswith(own) for url in visit.requests
    )  # of three files of pairs: one
    counted = "document.getElementById('missing').textContent"
    assert "1 of 239 responses have no row in the reference cache." in visit.evaluate(counted)


def test_a_pair_shows_texts_margin_and_each_tokens_log_prob(visit, inputs):
    shown_pair(visit, 0)
    chosen, rejected = (inputs.logps[inputs.key(0, side)].astype(np.float64) for side in (1, 2))
    facts = visit.evaluate("document.querySelector('#pair .facts').textContent").replace("−", "-")
    assert f"margin {chosen.sum() - rejected.sum():.2f} nats" in facts
    assert "test · sums · pairs.jsonl:1" in facts
    tokens = visit.evaluate("[...document.querySelectorAll('#chosen .token')].map((span) => span.textContent)")
    assert "".join(tokens) == f"it is 2\n\nyes{END}" and len(tokens) == len(chosen)
    # 0.1, 1, 3 and 6 nats below certainty begin another colour; the line beneath differs as well.
    levels = visit.evaluate(
        "[...document.querySelectorAll('#chosen .token')].map((span) => span.className.match(/s(\\d)/)[1])"
    )
    assert [int(level) for level in levels] == [sum(-logp >= bound for bound in (0.1, 1, 3, 6)) for logp in chosen]
    looks = visit.evaluate(
        "[...document.querySelectorAll('.scale .token')].map((span) => { const style = getComputedStyle(span);"
        "return [style.backgroundColor, style.borderBottomStyle + style.borderBottomWidth]; })"
    )
    assert len({colour for colour, _ in looks}) == 5 and len({line for _, line in looks}) >= 4


def test_tokens_are_read_off_with_the_keyboard_and_with_the_pointer(browser, visit, inputs):
    shown_pair(visit, 0)
    logps = inputs.logps[inputs.key(0, 1)]
    visit.evaluate("document.querySelector('#chosen .tokens').focus()")
    for _ in range(2):
        press(browser, visit, "ArrowRight", 39)
    said = visit.evaluate("document.querySelector('#chosen .reading').textContent").replace("−", "-")
    assert f"token 2 of {len(logps)}, {logps[1]:.3f} nats" in said
    assert visit.evaluate("document.querySelector('#pair h2').textContent") == "Pair 0"  # the key turned no page
    visit.evaluate("document.querySelector('#rejected .token').scrollIntoView({ block: 'center' })")
    place = "(({ x, y, width, height }) => [x + width / 2, y + height / 2])"
    x, y = visit.evaluate(f"{place}(document.querySelector('#rejected .token').getBoundingClientRect())")
    for dx in (0, 1):
        browser.call("Input.dispatchMouseEvent", visit.session, type="mouseMoved", x=x + dx, y=y)
    visit.wait_until("!document.getElementById('tip').hidden")
    tip = visit.evaluate("document.getElementById('tip').textContent").replace("−", "-")
    assert f"token 1 of {len(inputs.logps[inputs.key(0, 2)])}, {inputs.logps[inputs.key(0, 2)][0]:.3f} nats" in tip


def test_markup_and_marks_in_data_stay_text(browser, inputs):
    visit = at(browser, inputs, "#pair=2")
    shown_pair(visit, 2)
    joined = "[...document.querySelectorAll('#{} .token')].map((span) => span.textContent).join('')"
    assert visit.evaluate(joined.format("chosen")) == f"good {HOSTILE}{END}"
    assert visit.evaluate("document.querySelector('#prompt .text').textContent") == f"prompt {HOSTILE}"
    assert HOSTILE in visit.evaluate("document.querySelector('#pair .facts').textContent")
    assert enter(visit, 1, category="0") == [2]  # categories in order: the hostile one first
    assert visit.evaluate("document.querySelector('#rows td:nth-of-type(2)').textContent") == HOSTILE
    assert visit.evaluate("[window.harmed ?? null, document.images.length]") == [None, 0]
    assert visit.errors == []
    # A character of several tokens is one piece, whose tokens all have their log-prob.
    grouped = next(
        index
        for index, text in enumerate(
            visit.evaluate("[...document.querySelectorAll('#chosen .token')].map((span) => span.textContent)")
        )
        if text == "本"
    )
    visit.evaluate(f"document.querySelectorAll('#chosen .token')[{grouped}].click()")
    assert "which make one character" in visit.evaluate("document.querySelector('#chosen .reading').textContent")


def test_filters_and_orders(visit, inputs):
    logps = inputs.logps
    sums = [
        [
            logps[inputs.key(n, side)].astype(np.float64).sum() if inputs.key(n, side) in logps else None
            for side in (1, 2)
        ]
        for n in range(120)
    ]
    margins = {n: chosen - rejected for n, (chosen, rejected) in enumerate(sums) if rejected is not None}
    by_margin = sorted(margins, key=lambda n: -margins[n])
    assert enter(visit, 120, order="margin", descending=True) == by_margin[:50]
    assert enter(visit, 120, descending=False) == by_margin[::-1][:50]
    above = [n for n in by_margin[::-1] if margins[n] >= 1]
    assert enter(visit, len(above), margin_least="1") == above[:50]  # without the pair that has no margin
    assert enter(visit, 2, margin_least="", order="id", split="test") == [0, 1]
    assert enter(visit, 1, missing_rows="some") == [1]
    assert enter(visit, 1, split="", missing_rows="", category="-1") == [3]
    lengths = [[len(inputs.ids(text, END)) for text in PAIRS[n][1:3]] for n in range(120)]
    longest = sorted(range(120), key=lambda n: -lengths[n][0])
    assert enter(visit, 120, category="", order="chosen", descending=True) == longest[:50]
    long = [n for n in range(120) if max(lengths[n]) >= 12]
    assert enter(visit, len(long), order="id", descending=False, length_least="12") == long[:50]


def test_duplicates_are_found_named_and_linked(visit):
    assert enter(visit, 2, marks="prompt") == [0, 1]
    assert enter(visit, 2, marks="opposed") == [0, 1]
    assert enter(visit, 2, marks="text") == [0, 3]
    assert enter(visit, 117, marks="none")[:2] == [2, 4]
    shown_pair(visit, 0)
    said = "[...document.querySelectorAll('#rejected .others')].map((line) => line.textContent.trim())"
    assert visit.evaluate(said) == ["Also in 1 other pair of this prompt: 1", "On the other side in 1 other pair: 1"]
    visit.evaluate("document.querySelector('#chosen .others a').click()")
    shown_pair(visit, 3)


@pytest.mark.parametrize(
    "words, pairs", [("NEEDLE", [3]), ("good answer so so so so so so 13", [13]), ("jsonl:118", [117])]
)
def test_search_reads_all_texts_in_any_case(visit, words, pairs):
    """The last two files of pairs are none that the page has opened."""
    assert enter(visit, len(pairs), search=words) == pairs


def test_keys_go_through_what_was_found_and_a_link_opens_its_pair(browser, inputs, visit):
    assert enter(visit, 2, marks="text") == [0, 3]
    visit.evaluate("document.activeElement.blur()")
    press(browser, visit, "j", 74, "j")
    shown_pair(visit, 3)
    assert visit.evaluate("location.hash") == "#pair=3"
    press(browser, visit, "ArrowRight", 39)
    press(browser, visit, "k", 75, "k")
    shown_pair(visit, 0)
    press(browser, visit, "/", 191, "/")
    press(browser, visit, "j", 74, "j")
    assert visit.evaluate("[document.activeElement.id, document.activeElement.value]") == ["search", "j"]
    far = at(browser, inputs, "#pair=115")
    shown_pair(far, 115)
    assert far.evaluate("document.querySelector('#rows tr[aria-current] th').textContent") == "115"
    assert "not on this page" in at(browser, inputs, "#pair=500").evaluate(
        "document.getElementById('pair').textContent"
    )


def test_a_response_without_a_row_is_shown_and_said_to_have_none(browser, inputs):
    visit = at(browser, inputs, "#pair=1")
    shown_pair(visit, 1)
    assert "no margin: a log-prob is missing" in visit.evaluate("document.querySelector('#pair .facts').textContent")
    assert "no row in the reference cache" in visit.evaluate("document.querySelector('#rejected .facts').textContent")
    assert visit.evaluate("document.querySelector('#rejected .tokens').textContent") == f"unscored{END}"
    visit.evaluate("document.querySelector('#rejected .token').click()")
    assert "no log-prob stored" in visit.evaluate("document.querySelector('#rejected .reading').textContent")


def test_policies_answers_stand_beside_the_pairs_of_their_prompt(browser, inputs):
    visit = at(browser, inputs, "#pair=1")
    shown_pair(visit, 1)
    said = visit.evaluate("[...document.querySelectorAll('.answer')].map((answer) => answer.textContent)")
    assert len(said) == 2 and f"policy {HOSTILE}" in said[0] and f"reference {HOSTILE}" in said[1]
    assert "log-ratio 1.50 nats" in said[0] and "true reward 0.500" in said[0]
    other = at(browser, inputs, "#pair=4")
    shown_pair(other, 4)
    assert other.evaluate("document.querySelectorAll('.answer').length") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_on_every_colour(browser, visit, scheme):
    """WCAG 2.2: 4.5 to 1 and more between text and what is behind it."""
    browser.call(
        "Emulation.setEmulatedMedia", visit.session, features=[{"name": "prefers-color-scheme", "value": scheme}]
    )
    colours = visit.evaluate(
        "[getComputedStyle(document.body), ...[...document.querySelectorAll('.scale .token')].slice(1).map((s) =>"
        " getComputedStyle(s))].map((style, index) => index ? style.backgroundColor : style.color)"
    )
    ink, *behind = (luminance([int(part) for part in colour[4:-1].split(",")]) for colour in colours)
    assert len(behind) == 4 and (ink > 0.5) == (scheme == "dark")
    assert all((max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) >= 4.5 for paper in behind)


def luminance(colour: list[int]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in colour)]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))
