"""Mapped rows of sft.parquet are those of the file."""

import numpy as np
import pytest

from pipeline.data.tables import SFT_SCHEMA, read_sft, write_table
from pipeline.errors import RequestError, RunFailed
from pipeline.tokens.supervised import Supervised, open_supervised
from tests.tiny import write_sft


@pytest.fixture
def rows(tmp_path):
    return write_sft(tmp_path / "sft.parquet", 40)


def test_they_hold_the_ids_of_the_rows_in_their_order(rows):
    table, found = read_sft(rows), Supervised(open_supervised(rows).path)
    assert len(found) == len(table) == 40
    expected = list(table.select("prompt_ids", "response_ids").iter_rows())
    asked = [39, 0, 7, 7, *range(40)]
    given = found.sequences(np.array(asked))
    assert [(a.tolist(), b.tolist()) for a, b in given] == [expected[row] for row in asked]
    for side in (0, 1):
        assert found.lengths(side).tolist() == [len(row[side]) for row in expected]
    assert np.shares_memory(given[2][1], given[3][1]) and not given[0][0].flags.writeable


def test_another_file_gets_another_folder_and_none_is_an_empty_one(rows):
    first = open_supervised(rows)
    write_table(read_sft(rows).clear().to_arrow().cast(SFT_SCHEMA), rows, SFT_SCHEMA)
    second = open_supervised(rows)
    assert len(first) == 40 and len(second) == 0 and second.lengths(1).tolist() == []


def test_a_torn_folder_is_refused_by_ranks_and_made_anew_by_the_stage(rows):
    path = open_supervised(rows).path
    (path / "response_ids").write_bytes(b"torn")
    with pytest.raises(RunFailed, match="not whole"):
        Supervised(path)
    assert open_supervised(rows).sequences(np.array([0]))[0][1].tolist() == read_sft(rows)["response_ids"][0].to_list()


def test_without_a_file_the_error_names_the_stage(tmp_path):
    with pytest.raises(RequestError, match="refcache prepare"):
        open_supervised(tmp_path / "sft.parquet")
