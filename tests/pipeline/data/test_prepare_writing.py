"""Outputs are replaced together at the end, and nothing else is."""

import pytest

from pipeline.errors import RequestError
from pipeline.params import ModelParams
from tests.pipeline.data import chat_tokenizers
from tests.pipeline.data.preparing import SCRATCH, digests, file_params, pair_rows, prepare_into, sft_rows, write_jsonl


@pytest.fixture
def folder(tmp_path):
    write_jsonl(tmp_path / "in" / "pairs.jsonl", pair_rows(20))
    write_jsonl(tmp_path / "in" / "sft.jsonl", sft_rows(20))
    return tmp_path / "in"


def test_a_folder_of_other_things_is_not_replaced_by_the_tokenizer(folder, tmp_path):
    (tmp_path / "out" / "tokenizer").mkdir(parents=True)
    (tmp_path / "out" / "tokenizer" / "thesis.tex").write_text("years of work")
    with pytest.raises(RequestError, match="holds files and no tokenizer"):
        prepare_into(tmp_path / "out", file_params(folder))
    assert digests(tmp_path / "out").keys() == {"tokenizer/thesis.tex"}


def test_a_failure_while_writing_leaves_the_earlier_outputs(folder, tmp_path, monkeypatch):
    prepare_into(tmp_path / "out", file_params(folder))
    before = digests(tmp_path / "out")
    write_jsonl(folder / "pairs.jsonl", pair_rows(30))

    def full_disk(*_args, **_options):
        raise OSError("No space left on device")

    monkeypatch.setattr("pipeline.data.prepare.write_json", full_disk)  # the last thing that is written
    with pytest.raises(OSError, match="No space left"):
        prepare_into(tmp_path / "out", file_params(folder))
    assert digests(tmp_path / "out") == before


def test_what_a_killed_run_left_behind_is_cleared_away(folder, tmp_path):
    out = tmp_path / "out"
    (out / ".tokenizer.new").mkdir(parents=True)
    (out / ".tokenizer.new" / "half.json").write_text("{")
    (out / ".tokenizer.old").mkdir()
    prepare_into(out, file_params(folder))
    assert not list(out.rglob(".*"))


def test_files_of_an_earlier_tokenizer_do_not_linger(folder, tmp_path):
    chat_tokenizers.plain().save_pretrained(tmp_path / "model")
    plain_model = ModelParams(name=str(tmp_path / "model"))
    prepare_into(tmp_path / "out", file_params(folder), SCRATCH)
    assert (tmp_path / "out" / "tokenizer" / "chat_template.jinja").exists()
    prepare_into(tmp_path / "out", file_params(folder), plain_model)
    assert not (tmp_path / "out" / "tokenizer" / "chat_template.jinja").exists()
