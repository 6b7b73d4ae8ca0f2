"""What is written for the page: margins, lengths, duplicates, choices; and that data stay data."""

import json
import re

import numpy as np
import pytest
from click.testing import CliRunner

from cache import Journal, logps_table, prompt_key
from pipeline.browse.folder import PAIRS_A_FILE, as_script
from pipeline.browse.pairs import Choice
from pipeline.errors import RequestError
from pipeline.model.digests import config_digest, weights_digest
from pipeline.model.tokenizer import END
from stages.__main__ import main
from tests.cache.rows import identity
from tests.pipeline.browse.inputs import ALL, Inputs, write_samples
from tests.tiny import write_model

HOSTILE = "</script><!--\u2028\u2029\u202e\"'`\\ é日👩‍🚀\x00\x7f"

PAIRS = [
    ("one", "yes 👩‍🚀", "no", {"category": "b", "split": "test", "chosen_reward": 1.5}),
    ("one", "no", "never", {"category": "a", "split": "test"}),
    ("two", "yes 👩‍🚀", "never", {}),
    (HOSTILE, HOSTILE, "maybe", {"category": HOSTILE, "source": HOSTILE}),
    *((f"many {n}", f"long {'so ' * n}", "short", {}) for n in range(60)),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return Inputs(tmp_path_factory.mktemp("browse"), PAIRS, unscored={"maybe"})


@pytest.fixture
def written(inputs):
    assert inputs.browse().missing == 1
    return inputs


def read(inputs, name):
    """The JSON in a data file, whose calls are all alike."""
    text = (inputs.root / "browse/data" / name).read_text(encoding="ascii")
    arguments = re.fullmatch(r"browse\.\w+\((.*)\);\n", text)[1]
    return json.loads(f"[{arguments}]")


def pairs_of(inputs, kind):
    files = sorted(path.name for path in (inputs.root / "browse/data").glob(f"{kind}-*.js"))
    return [entry for name in files for entry in read(inputs, name)[1]]


def columns(inputs):
    return read(inputs, "index.js")[0]["columns"]


def test_margins_are_differences_of_sums_and_of_means(written):
    found = columns(written)
    for number in range(len(PAIRS)):
        if number == 3:
            assert (found["margin"][3], found["token_margin"][3], found["missing"][3]) == (None, None, 1)
            continue
        chosen, rejected = (written.logps[written.key(number, side)].astype(np.float64) for side in (1, 2))
        assert found["margin"][number] == pytest.approx(chosen.sum() - rejected.sum(), abs=1e-4)
        assert found["token_margin"][number] == pytest.approx(chosen.mean() - rejected.mean(), abs=1e-4)
        assert (found["chosen"][number], found["rejected"][number]) == (len(chosen), len(rejected))
        assert found["missing"][number] == 0


def test_tokens_have_their_log_probs_and_cover_their_text(written):
    for number, (texts, tokens) in enumerate(zip(pairs_of(written, "texts"), pairs_of(written, "tokens"), strict=True)):
        assert texts == [PAIRS[number][0], *(PAIRS[number][side] + END for side in (1, 2)), texts[3]]
        for side, name in ((1, "chosen"), (2, "rejected")):
            units = len(texts[side].encode("utf-16-le")) // 2
            assert sum(length for length in tokens[name]["lengths"] if length >= 0) == units
            ids = written.ids(PAIRS[number][side], END)
            assert len(tokens[name]["lengths"]) == len(ids)
            stored = written.logps.get(written.key(number, side))
            if stored is None:
                assert (tokens[name]["logps"], tokens[name]["sum"]) == (None, None)
            else:
                assert tokens[name]["logps"] == pytest.approx(stored.astype(np.float64) * 1000, abs=0.51)


def test_duplicates_of_prompts_responses_and_texts(written):
    first, second, third, *_ = [pair["others"] for pair in pairs_of(written, "tokens")]
    assert first == {
        "prompt": [1, [1]],
        "chosen text": [1, [2]],
        "rejected response": [1, [1]],
        "rejected opposed": [1, [1]],
    }
    assert second == {
        "prompt": [1, [0]],
        "chosen response": [1, [0]],
        "chosen opposed": [1, [0]],
        "rejected text": [1, [2]],
    }
    assert third == {"chosen text": [1, [0]], "rejected text": [1, [1]]}


def test_duplicates_are_counted_over_all_and_named_up_to_twenty(written):
    """Sixty prompts that share a rejected response."""
    last = pairs_of(written, "tokens")[-1]["others"]
    assert last == {"rejected text": [59, list(range(4, 24))]}
    marks = read(written, "index.js")[0]["marks"]
    assert [marks[bit] for bit in range(4) if columns(written)["marks"][-1] & 1 << bit] == ["text"]


def test_duplicates_of_a_choice_are_looked_for_among_all_pairs(inputs):
    inputs.browse(ALL._replace(limit=1))
    (only,) = pairs_of(inputs, "tokens")
    assert only["others"]["prompt"] == [1, [1]]


@pytest.mark.parametrize(
    ("choice", "pairs"),
    [
        (ALL._replace(split="test"), [0, 1]),
        (ALL._replace(limit=3), [0, 1, 2]),
        (ALL._replace(split="test", limit=1), [0]),
        (ALL._replace(sample=1000), list(range(64))),
    ],
)
def test_choices(inputs, choice, pairs):
    assert inputs.browse(choice).pairs == len(pairs)
    assert columns(inputs)["id"] == pairs


def test_a_sample_is_the_same_for_the_same_seed_and_in_file_order(inputs):
    drawn = []
    for seed in (0, 0, 1):
        inputs.browse(Choice(split=None, limit=None, sample=10, seed=seed))
        drawn.append(columns(inputs)["id"])
    assert drawn[0] == drawn[1] == sorted(drawn[0]) and len(drawn[0]) == 10
    assert drawn[2] != drawn[0]
    texts = pairs_of(inputs, "texts")
    assert [entry[0] for entry in texts] == [PAIRS[number][0] for number in drawn[2]]


def test_a_smaller_choice_leaves_no_file_of_a_larger_one_and_nothing_else_is_touched(inputs):
    inputs.browse()
    assert len(list((inputs.root / "browse/data").glob("texts-*"))) == -(-len(PAIRS) // PAIRS_A_FILE) == 2
    mine = inputs.root / "browse/data/notes.js"
    mine.write_text("mine")
    inputs.browse(ALL._replace(limit=2))
    left = {path.name for path in (inputs.root / "browse/data").iterdir()}
    assert left == {"index.js", "texts-00000.js", "tokens-00000.js", "notes.js"}


def test_an_empty_choice_names_the_splits(inputs):
    with pytest.raises(RequestError, match=r"no pairs in split 'dev' \(62 in train, 2 in test\)"):
        inputs.browse(ALL._replace(split="dev"))


def test_data_are_ascii_json_that_ends_no_script():
    script = as_script("f", 3, [HOSTILE, {HOSTILE: None}])
    assert script.isascii() and script.count("\n") == 1
    assert "<" not in script and json.loads(f"[{script[2:-3]}]") == [3, [HOSTILE, {HOSTILE: None}]]


def test_the_page_escapes_what_comes_from_data_and_allows_no_inline_script(written):
    page = (written.root / "browse/index.html").read_text(encoding="utf-8")
    assert "</script><!--" not in page and "&lt;/script&gt;&lt;!--" in page
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert re.findall(r"<script(?! src=)", page) == [] and not re.search(r"\son\w+=|https?://", page)


def test_answers_of_policies_stand_with_the_pairs_of_their_prompt(inputs):
    asked = {"prompt_key": prompt_key(inputs.ids("one")), "author": "policy", "n_tokens": 2, "true_reward": None}
    rows = [asked | {"text": HOSTILE, "policy_logp": -1.0, "reference_logp": float("nan")}]
    rows += [rows[0] | {"prompt_key": b"\0" * 16}]  # of no pair here
    inputs.browse(answers=write_samples(inputs.root / "answers", "dpo-0", rows))
    answers = [pair["answers"] for pair in pairs_of(inputs, "tokens")]
    assert answers[:2] == [{"dpo-0": [["policy", HOSTILE, 2, -1.0, None, None]]}] * 2
    assert not any(answers[2:])
    with pytest.raises(RequestError, match="Leave --answers out"):
        inputs.browse(answers=inputs.root / "pairs")


def test_the_command_says_what_is_shown_and_what_is_missing(inputs):
    folders = [part for name in ("pairs", "tokenizer") for part in (f"--{name}", inputs.root / name)]
    folders += ["--reference", inputs.root / "logps", "--out", inputs.root / "browse"]

    def run(*more):
        return CliRunner().invoke(main, ["browse", *map(str, [*folders, *more])])

    result = run("--limit", 10)
    assert result.exit_code == 0, result.output
    assert result.stdout == (
        f"browse: 10 pairs of 64 (--split, --limit and --sample choose) in {inputs.root}/browse/index.html\n"
    )
    assert "1 of 19 responses have no row" in result.stderr
    assert run("--split", "dev").exit_code == 2
    assert run("--reference", inputs.root / "absent").exit_code == 2
    assert "absent does not exist" in run("--tokenizer", inputs.root / "absent").stderr


def test_log_probs_that_evaluate_kept_of_a_policy_are_found_by_its_weights(inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("REFCACHE_HOME", str(tmp_path / "home"))
    policy = write_model(tmp_path / "dpo-0")
    with pytest.raises(RequestError, match="not evaluated against this reference"):
        inputs.browse(policies=[policy])
    weights, config = weights_digest(policy), config_digest(policy)
    own = identity(weights=weights, config=config)
    asked = [inputs.key(0, 1), inputs.key(1, 2)]
    given = [np.linspace(-3, -1, len(inputs.logps[key]), dtype=np.float32) for key in asked]
    texts = [(PAIRS[0][0], PAIRS[0][1]), (PAIRS[1][0], PAIRS[1][2])]
    with Journal(tmp_path / "home/answers" / own.reference_id / "logps") as journal:
        journal.append(
            logps_table(
                response_keys=asked,
                prompt_keys=[prompt_key(inputs.ids(prompt)) for prompt, _ in texts],
                n_prompt_tokens=[len(inputs.ids(prompt)) for prompt, _ in texts],
                token_ids=[inputs.ids(response, END) for _, response in texts],
                token_logps=given,
            )
        )
    inputs.browse(policies=[policy])
    first, second, third, *_ = [pair["policies"]["dpo-0"] for pair in pairs_of(inputs, "tokens")]
    assert (list(first), list(second), third) == (["chosen"], ["rejected"], {})
    assert first["chosen"]["sum"] == pytest.approx(given[0].astype(np.float64).sum(), abs=1e-4)
    assert second["rejected"]["logps"] == pytest.approx(given[1].astype(np.float64) * 1000, abs=0.51)
    assert "dpo-0 (2 of these responses)" in (inputs.root / "browse/index.html").read_text()
