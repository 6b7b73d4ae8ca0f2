"""evaluate.suites: what is accepted, how it becomes what `prepare` reads, and in which words errors speak."""

import re

import pytest
from ruamel.yaml import YAML

from pipeline.errors import RequestError
from pipeline.params import PrepareParams, SuiteParams, load_params
from tests import ROOT

DEFAULT = ROOT / "params.yaml"
OWN = PrepareParams(max_tokens=100, max_prompt_tokens=60, long_prompts="truncate_left", chat_template="mine.jinja")


@pytest.mark.parametrize(
    ("suite", "expected"),
    [
        ("{x: {}}", ["evaluate.suites.x", "either files", "or hub"]),
        ("{x: {files: [a.jsonl], hub: {dataset: b}}}", ["evaluate.suites.x", "either files", "or hub"]),
        ("{x: {hub: {dataset: b, test_split: test}}}", ["evaluate.suites.x", "hub.split"]),
        ("{x: {files: [a.jsonl], domain: near}}", ["evaluate.suites.x.domain", "'in' or 'out'", "near"]),
        ("{x: {files: [a.jsonl], test_share: 0.1}}", ["evaluate.suites.x.test_share", "unknown key"]),
        ("{../x: {files: [a.jsonl]}}", ["'../x'", "letters, digits"]),
        ("{index.json: {files: [a.jsonl]}}", ["'index.json'", "letters, digits"]),
        ("{x: {files: [a.jsonl]}, X: {files: [a.jsonl]}}", ["'x' and 'X'", "one folder"]),
        ("{x: {files: [a.jsonl], max_tokens: 64}}", ["evaluate.suites.x", "max_prompt_tokens (64)", "(64)"]),
        ("{x: {files: [a.jsonl], form: ranked}}", ["evaluate.suites.x", "evaluate.suites.x.ranked: {column"]),
    ],
)
def test_what_no_suite_can_be_is_refused_by_its_key(suite, expected):
    with pytest.raises(RequestError) as error:
        load_params(DEFAULT, [f"evaluate.suites={suite}"])
    for word in expected:
        assert word in str(error.value)


def test_a_suite_is_prepared_as_the_pairs_are_but_for_what_it_says_itself():
    found = SuiteParams(files=["a.jsonl"], max_tokens=90, wrong_options="all", on_bad_row="skip").prepare_params(
        OWN, "in"
    )
    assert (found.source, found.input, found.files and found.files.pairs) == ("files", "in", ["a.jsonl"])
    assert (found.max_tokens, found.max_prompt_tokens, found.long_prompts) == (90, 60, "truncate_left")
    assert (found.sft.source, found.test_share, found.chat_template) == ("none", 0.0, "auto")
    assert (found.wrong_options, found.on_bad_row) == ("all", "skip")
    plain = OWN.model_copy(update={"chat_template": "never"})
    hub = SuiteParams.model_validate({"hub": {"dataset": "org/name", "split": "test"}, "max_prompt_tokens": 20})
    found = hub.prepare_params(plain, "in")
    assert (found.source, found.chat_template, found.max_prompt_tokens) == ("hub", "never", 20)
    assert found.hub is not None and found.hub.split == "test"


def test_errors_of_prepare_speak_of_the_suite_and_keep_keys_that_it_has_not():
    said = "see prepare.columns, prepare.input, prepare.chat_template, --on-bad-row skip (or prepare.on_bad_row: skip)"
    assert SuiteParams(files=["a"]).in_these_words(said, "x") == (
        "see evaluate.suites.x.columns, evaluate.suites_input, prepare.chat_template, "
        "evaluate.suites.x.on_bad_row: skip"
    )


@pytest.mark.parametrize("file", [DEFAULT, *sorted((ROOT / "presets").glob("*.yaml"))], ids=lambda file: file.stem)
def test_dvc_finds_the_folder_and_the_suites_in_every_file(file):
    """A section that is left out has its default for us, but not for dvc.yaml."""
    found = YAML(typ="safe", pure=True).load(file)
    assert found["evaluate"]["suites_input"] == found["prepare"]["input"]
    assert isinstance(found["evaluate"]["suites"], dict)


def test_the_suites_that_presets_show_as_comments_are_valid():
    for file in sorted((ROOT / "presets").glob("ultrafeedback-*.yaml")):
        text = file.read_text()
        if "  # suites:" in text:
            shown = re.sub(r"^  # ", "  ", text[text.index("  # suites:") :], flags=re.MULTILINE)
            suites = YAML(typ="safe", pure=True).load(shown)["suites"]
        else:
            suites = YAML(typ="safe", pure=True).load(text)["evaluate"]["suites"]
        assert {"rewardbench2", "mmlu_pro"} < suites.keys()
        found = {name: SuiteParams.model_validate(suite) for name, suite in suites.items()}
        assert found["rewardbench2"].ties and found["rewardbench2"].columns.category == "subset"
