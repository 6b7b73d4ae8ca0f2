"""The command: suites are prepared as any pairs, apart from them; a bad one leaves all earlier ones in place."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from pipeline.data.suites import read_suite_rows, suite_folders
from pipeline.data.tables import read_pairs, read_responses
from stages.__main__ import main
from tests import ROOT
from tests.pipeline.data.preparing import digests, pair_rows, sft_rows, write_jsonl

OUT = "data/prepared/suites"
PAPER = [
    {"id": "7", "prompt": "Say a.", "chosen": ["a"], "rejected": ["b", "c", "d"], "subset": "Factuality"},
    {"id": "ref:0", "prompt": "A colour?", "chosen": ["red"], "rejected": ["one"], "subset": "Ties"},
    {"id": "tied:0", "prompt": "Colours?", "chosen": ["red", "blue"], "rejected": ["one", "two"], "subset": "Ties"},
]
CHOICES = [{"question": "1 + 1?", "options": ["1", "2", "3", "N/A"], "answer_index": 1, "category": "math", "id": 70}]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Prepared pairs in a folder of their own, and files of suites."""
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
    given = tmp_path / "data" / "input"
    for name, rows in {"pairs": pair_rows(20), "sft": sft_rows(10), "paper": PAPER, "choices": CHOICES}.items():
        write_jsonl(given / f"{name}.jsonl", rows)
    paths = [f"--{name}=data/prepared/{name}" for name in ("tokenizer", "pairs")]
    paths += ["--sft=data/prepared/sft.parquet", "--summary=data/prepared/summary.json"]
    assert CliRunner().invoke(main, ["prepare", *paths]).exit_code == 0
    return tmp_path


def run(suites, *more):
    options = ["--set", f"evaluate.suites={json.dumps(suites)}", *more]
    return CliRunner().invoke(main, ["suites", "--tokenizer", "data/prepared/tokenizer", "--out", OUT, *options])


TWO = {
    "paper": {"files": ["paper.jsonl"], "columns": {"category": "subset"}, "ties": True},
    "choices": {"files": ["choices.jsonl"], "wrong_options": "all", "domain": "in"},
}


def test_suites_are_pairs_with_their_rows_and_ids(project):
    before = digests(project / "data" / "prepared")
    result = run(TWO)
    assert result.exit_code == 0, result.output
    assert "paper: 8 pairs over 3 prompts" in result.stdout and "no test pair" not in result.output
    found = digests(project / OUT)
    files = ("pairs.parquet", "responses.parquet", "rows.parquet", "summary.json")
    assert found.keys() == {"index.json", *(f"{suite}/{file}" for suite in TWO for file in files)}
    assert json.loads((project / OUT / "index.json").read_text()) == ["paper", "choices"]
    folders = suite_folders(project / OUT)
    pairs = read_pairs(folders["paper"])
    assert pairs["category"].to_list() == ["Factuality"] * 3 + ["Ties"] * 5
    assert read_suite_rows(folders["paper"]).rows() == [(f"paper.jsonl:{n + 1}", PAPER[n]["id"]) for n in range(3)]
    assert read_suite_rows(folders["choices"]).rows() == [("choices.jsonl:1", "70")]
    assert read_pairs(folders["choices"])["rejected_text"].to_list() == ["A. 1", "C. 3"]
    assert {name: digest for name, digest in digests(project / "data/prepared").items() if name in before} == before


def test_rows_are_tokenised_as_those_of_the_pairs(project):
    """The same response has the same key, so that nothing is scored twice."""
    assert run({"again": {"files": ["pairs.jsonl"]}}).exit_code == 0
    own, again = (read_responses(project / "data/prepared" / name) for name in ("pairs", "suites/again"))
    columns = ["response_key", "prompt_ids", "response_ids"]
    assert again.select(columns).equals(own.select(columns))
    assert own["prompt_ids"][0].len() > 2  # in the template's turns


def test_plain_pairs_have_plain_suites(project):
    assert run({"again": {"files": ["pairs.jsonl"]}}, "--set", "prepare.chat_template=never").exit_code == 0
    own, again = (read_responses(project / "data/prepared" / name) for name in ("pairs", "suites/again"))
    assert set(again["prompt_text"]) == set(own["prompt_text"])
    assert again["prompt_ids"].list.len().sum() < own["prompt_ids"].list.len().sum()


def test_a_suite_that_is_named_no_longer_goes_and_the_others_keep_their_bytes(project):
    assert run(TWO).exit_code == 0
    before = digests(project / OUT)
    assert run({"choices": TWO["choices"]}).exit_code == 0
    after = digests(project / OUT)
    assert after.keys() - {"index.json"} == {name for name in before if name.startswith("choices/")}
    assert all(before[name] == after[name] for name in after if name != "index.json")
    assert run({}).exit_code == 0
    assert digests(project / OUT).keys() == {"index.json"} and suite_folders(project / OUT) == {}


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"files": ["absent.jsonl"]}, ["absent.jsonl does not exist", "evaluate.suites_input"]),
        ({"files": ["broken.jsonl"]}, ["broken.jsonl:1", "'rejected'", "evaluate.suites.bad.on_bad_row: skip"]),
        ({"files": ["kto.jsonl"]}, ["1 rows are single responses", "expected pairs"]),
        ({"files": ["pairs.jsonl"], "ties": True}, ["evaluate.suites.bad.ties", "0 ids", "ref:N and tied:N"]),
        ({"files": ["pairs.jsonl"], "max_prompt_tokens": 2}, ["no usable", "evaluate.suites.bad.max_prompt_tokens"]),
    ],
)
def test_a_bad_suite_is_named_and_leaves_all_earlier_output(project, bad, says):
    assert run(TWO).exit_code == 0
    before = digests(project / "data" / "prepared")
    write_jsonl(project / "data/input/broken.jsonl", [{"prompt": "a", "chosen": "b"}])
    write_jsonl(project / "data/input/kto.jsonl", [{"prompt": "a", "completion": "b", "label": True}, *pair_rows(2)])
    result = run({"choices": TWO["choices"], "bad": bad})
    assert result.exit_code == 2
    for word in ["Error: Suite bad: ", *says, f"{OUT} is as it was"]:
        assert word in result.stderr
    assert digests(project / "data" / "prepared") == before


def test_bad_rows_are_left_out_where_that_is_asked_for(project):
    write_jsonl(project / "data/input/broken.jsonl", [{"prompt": "a", "chosen": "b"}, *pair_rows(2)])
    assert run({"some": {"files": ["broken.jsonl"], "on_bad_row": "skip"}}).exit_code == 0
    folder = suite_folders(project / OUT)["some"]
    assert read_suite_rows(folder)["source"].to_list() == ["broken.jsonl:2", "broken.jsonl:3"]
    assert json.loads((folder / "summary.json").read_text())["skipped_rows"]["count"] == 1


def test_ids_are_text_or_nothing(project):
    ids = [3, "x", None, 1.5, ["y"]]
    write_jsonl(project / "data/input/ids.jsonl", [row | {"id": i} for i, row in zip(ids, pair_rows(5), strict=True)])
    assert run({"ids": {"files": ["ids.jsonl"]}}).exit_code == 0
    assert read_suite_rows(project / OUT / "ids")["id"].to_list() == ["3", "x", None, "1.5", None]


def test_somebodys_folder_and_an_absent_tokenizer_are_refused(project):
    (project / OUT).mkdir()
    (project / OUT / "thesis.tex").write_text("mine")
    for suites in (TWO, {}):
        result = run(suites)
        assert result.exit_code == 2 and "no index.json" in result.stderr
    assert (project / OUT / "thesis.tex").read_text() == "mine"
    (project / OUT / "thesis.tex").unlink()
    result = run(TWO, "--tokenizer", "absent")
    assert result.exit_code == 2 and "run `dvc repro prepare`" in result.stderr


def test_a_saved_hub_dataset_is_a_suite(project):
    import datasets

    datasets.DatasetDict({"test": datasets.Dataset.from_list(PAPER)}).save_to_disk(project / "data/input/saved")
    suite = {"hub": {"dataset": "saved", "split": "test"}, "columns": {"category": "subset"}, "ties": True}
    result = run({"rb2": suite})
    assert result.exit_code == 0, result.output
    assert read_suite_rows(project / OUT / "rb2")["source"].to_list() == [f"saved:test[{n}]" for n in range(3)]
    assert len(read_pairs(project / OUT / "rb2")) == 8


@pytest.mark.slow
def test_no_suites_no_torch(tmp_path):
    code = (
        "import sys; from stages.__main__ import main; from click.testing import CliRunner; "
        f"done = CliRunner().invoke(main, ['suites', '--tokenizer', 'none', '--out', {str(tmp_path / 'out')!r}]); "
        "print(done.exit_code, *sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    status, *loaded = printed.split()
    assert status == "0" and not {"torch", "transformers", "datasets", "vllm"} & set(loaded)
    assert json.loads((tmp_path / "out" / "index.json").read_text()) == []


def test_the_index_is_needed(tmp_path):
    with pytest.raises(ValueError, match="run `dvc repro suites`"):
        suite_folders(tmp_path)
