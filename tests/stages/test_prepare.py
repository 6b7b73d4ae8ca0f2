"""The command: every wrong input ends with one clear message and exit code 2, and earlier outputs are untouched."""

import json

import pytest
from click.testing import CliRunner

from stages.__main__ import main
from tests.pipeline.data.preparing import digests, pair_rows, sft_rows, write_jsonl

GOOD = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = {
        "model": {"scratch": {"vocabulary_size": 300}},
        "prepare": {
            "source": "files",
            "files": {"pairs": ["pairs.jsonl"]},
            "sft": {"source": "files", "files": ["sft.jsonl"]},
            "test_share": 0.3,
        },
        "sft": {},
        "score": {},
        "trainable": "all",
        "train": {"variants": {"dpo": {"objective": "dpo"}}},
        "sweep": {"variants": ["dpo"], "seeds": [0]},
        "evaluate": {},
    }
    (tmp_path / "params.yaml").write_text(json.dumps(params))
    write_jsonl(tmp_path / "data" / "input" / "pairs.jsonl", pair_rows(20))
    write_jsonl(tmp_path / "data" / "input" / "sft.jsonl", sft_rows(10))
    return tmp_path


def run(*options):
    out = "data/prepared"
    paths = ["--sft", f"{out}/sft.parquet", "--tokenizer", f"{out}/tokenizer", "--pairs", f"{out}/pairs"]
    return CliRunner().invoke(main, ["prepare", *paths, "--summary", f"{out}/summary.json", *options])


def add_lines(project, *lines):
    with (project / "data" / "input" / "pairs.jsonl").open("ab") as file:
        for line in lines:
            file.write((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n")


def test_a_good_run_writes_the_declared_outputs_and_says_what_they_hold(project):
    result = run()
    assert result.exit_code == 0, result.output
    assert "pairs over" in result.stdout and "10 sft rows" in result.stdout
    assert set(digests(project / "data" / "prepared")) == {
        "sft.parquet",
        "pairs/pairs.parquet",
        "pairs/responses.parquet",
        "summary.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/chat_template.jinja",
    }


BAD_LINES = [
    (GOOD | {"rejected": "4"}, "chosen and rejected are identical"),
    (GOOD | {"prompt": "  "}, "the prompt is empty"),
    (GOOD | {"chosen": ""}, "chosen is empty"),
    (GOOD | {"rejected": "\n"}, "rejected is empty"),
    (b'{"prompt": "2+2?", ', "invalid JSON"),
    (b'{"prompt": "\xc3(", "chosen": "4", "rejected": "5"}', "invalid UTF-8"),
    (b"[]", "expected a JSON object"),
    ({"prompt": "2+2?", "chosen": "4"}, "no column 'rejected'"),
    (GOOD | {"chosen": 4}, "chosen is int"),
    (GOOD | {"prompt": {"text": "2+2?"}}, "prompt is dict"),
    (GOOD | {"chosen": "x" * 300 + "1", "rejected": "x" * 300 + "2"}, "identical after truncation to 100 tokens"),
    (GOOD | {"prompt": [{"role": "judge", "content": "2+2?"}]}, "unknown role judge"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES, ids=[reason for _, reason in BAD_LINES])
def test_a_bad_line_fails_with_its_place_and_leaves_earlier_outputs(project, line, reason):
    limits = ["--set", "prepare.max_tokens=100", "--set", "prepare.max_prompt_tokens=50"]
    assert run(*limits).exit_code == 0
    before = digests(project / "data" / "prepared")
    add_lines(project, line)
    result = run(*limits)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: data/input has 1 bad row; nothing was written.\n  pairs.jsonl:21: ")
    assert reason in result.stderr and "--on-bad-row skip" in result.stderr
    assert "Traceback" not in result.stderr
    assert digests(project / "data" / "prepared") == before

    result = run(*limits, "--on-bad-row", "skip")
    assert result.exit_code == 0
    assert result.stderr.startswith("Warning: data/input: skipped 1 bad row") and result.stderr.count("\n") == 1
    summary = json.loads((project / "data" / "prepared" / "summary.json").read_text())
    assert summary["skipped_rows"]["count"] == 1
    assert summary["skipped_rows"]["examples"][0]["where"] == "pairs.jsonl:21"
    assert sum(summary["pairs"].values()) == 20


def test_all_bad_rows_are_counted_and_the_first_ten_shown(project):
    add_lines(project, *[GOOD | {"chosen": ""}] * 12)
    (project / "data" / "input" / "sft.jsonl").write_text('{"prompt": "2+2?"}\n')
    result = run()
    assert result.exit_code == 2
    assert "data/input has 13 bad rows" in result.stderr
    assert result.stderr.count("\n  pairs.jsonl:") == 10 and "and 3 more" in result.stderr


def test_the_option_goes_before_the_parameter(project):
    add_lines(project, GOOD | {"chosen": ""})
    skip = ["--set", "prepare.on_bad_row=skip"]
    assert run(*skip).exit_code == 0
    assert run(*skip, "--on-bad-row", "fail").exit_code == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prepare.files.pairs=[absent.jsonl]"], "data/input/absent.jsonl does not exist"),
        (["prepare.files.pairs=[empty.jsonl]"], "data/input/empty.jsonl is empty"),
        (["prepare.files.pairs=[table.xlsx]"], "unknown extension '.xlsx'"),
        (["prepare.files.test_pairs=[pairs.jsonl]"], "no usable train pair is left"),
        (["prepare.max_prompt_tokens=2"], "20 pairs with a prompt above prepare.max_prompt_tokens (2) dropped"),
        (["prepare.sft={source: pairs, pairs_files: [other.jsonl]}"], "not among prepare.files.pairs"),
        (["prepare.sft={source: none}", "sft.epochs=0", "model={name: absent/folder}"], "model.name"),
        (["prepare.chat_template=absent.jinja"], "prepare.chat_template"),
        (["prepare.source=hub", "prepare.hub={dataset: input, split: other}"], "split 'other'"),
    ],
)
def test_a_wrong_request_ends_at_once_with_one_message(project, overrides, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (project / "data" / "input" / "empty.jsonl").touch()
    (project / "data" / "input" / "table.csv").write_text("a\n")
    result = run(*[part for override in overrides for part in ("--set", override)])
    assert result.exit_code == 2, result.output
    assert message in result.stderr and result.stderr.startswith("Error: ")
    assert not (project / "data" / "prepared").exists()


def test_messages_without_a_template_are_a_wrong_request(project):
    add_lines(project, {"prompt": [{"role": "user", "content": "2+2?"}], "chosen": "4", "rejected": "5"})
    result = run("--set", "prepare.chat_template=never")
    assert result.exit_code == 2 and "pairs.jsonl:21" in result.stderr and "prepare.chat_template" in result.stderr


def test_the_help_shows_an_example():
    result = CliRunner().invoke(main, ["prepare", "--help"])
    assert result.exit_code == 0 and "refcache prepare --sft" in result.output
