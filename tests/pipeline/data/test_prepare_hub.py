"""Datasets of the `datasets` library: saved ones and folders of files, offline."""

import datasets
import pytest

from pipeline.data.tables import read_pairs, read_sft
from pipeline.errors import RequestError
from pipeline.params import HubParams, PrepareParams
from pipeline.published.sources import Dataset
from tests.pipeline.data.preparing import pair_rows, prepare_into, write_jsonl


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def chats(count):
    """UltraFeedback-binarized: a prompt beside whole dialogues."""
    return [
        {
            "prompt": row["prompt"],
            **{
                side: [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row[side]},
                ]
                for side in ("chosen", "rejected")
            },
        }
        for row in pair_rows(count)
    ]


@pytest.fixture
def saved(tmp_path):
    splits = {"train_prefs": datasets.Dataset.from_list(chats(12)), "test_prefs": datasets.Dataset.from_list(chats(3))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "in" / "saved")
    return tmp_path / "in"


def hub_params(folder, **hub):
    return PrepareParams.model_validate({"source": "hub", "input": str(folder), "hub": hub, "sft": {"source": "pairs"}})


def test_a_saved_dataset_is_prepared_with_its_own_test_split(saved, tmp_path):
    params = hub_params(saved, dataset="saved", split="train_prefs", test_split="test_prefs")
    summary = prepare_into(tmp_path / "out", params)
    assert summary["pairs"] == {"train": 9, "test": 3} and summary["train_prompts_also_in_test"] == 3
    assert read_pairs(tmp_path / "out" / "pairs")["source"][0] == "saved:train_prefs[3]"
    assert len(read_sft(tmp_path / "out" / "sft.parquet")) == 9  # none of the test prompts


def test_a_folder_of_files_is_split_by_prompt_and_may_be_named_by_its_path(tmp_path):
    write_jsonl(tmp_path / "mine" / "train.jsonl", pair_rows(30))
    params = hub_params(tmp_path, dataset=str(tmp_path / "mine"))
    summary = prepare_into(tmp_path / "out", params.model_copy(update={"test_share": 0.3}))
    assert sum(summary["pairs"].values()) == 30 and summary["pairs"]["test"] > 0


def test_rows_selected_from_a_dataset_keep_their_order_and_places(saved, monkeypatch):
    monkeypatch.setattr("pipeline.published.sources.BATCH_ROWS", 5)
    rows = list(Dataset(HubParams(dataset="saved"), "train_prefs", saved).rows())
    assert [row.where for row in rows] == [f"saved:train_prefs[{n}]" for n in range(12)]
    assert [row.values["prompt"] for row in rows] == [row["prompt"] for row in pair_rows(12)]


@pytest.mark.parametrize(
    ("hub", "message"),
    [
        ({"dataset": "saved", "split": "train"}, r"no split 'train'; it has test_prefs, train_prefs"),
        ({"dataset": "files", "split": "validation"}, "validation.*could not be loaded"),
        ({"dataset": "nobody/such-dataset"}, r"could not be loaded(.|\n)*a network"),
    ],
)
def test_an_unknown_dataset_or_split_is_a_wrong_request(saved, tmp_path, hub, message):
    write_jsonl(saved / "files" / "train.jsonl", pair_rows(3))
    with pytest.raises(RequestError, match=message):
        prepare_into(tmp_path / "out", hub_params(saved, **hub))


def test_an_empty_dataset_is_a_wrong_request(tmp_path):
    datasets.Dataset.from_list(pair_rows(2)).select([]).save_to_disk(tmp_path / "in" / "empty")
    with pytest.raises(RequestError, match=r"dataset empty .*could not be loaded"):
        prepare_into(tmp_path / "out", hub_params(tmp_path / "in", dataset="empty"))
