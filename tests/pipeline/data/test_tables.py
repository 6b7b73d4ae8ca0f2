"""Reading a part of a prepared table gives the rows and columns that were asked for, in file order."""

import pyarrow.parquet as pq
import pytest

from pipeline.data.tables import read_pairs, read_responses
from tests.tiny import write_pairs


@pytest.mark.parametrize("read, file", [(read_pairs, "pairs"), (read_responses, "responses")])
@pytest.mark.parametrize("split", ["train", "test", "neither", None])
@pytest.mark.parametrize("columns", [None, ["prompt_text", "prompt_key"], ["split"]])
def test_a_split_has_its_rows_in_file_order_and_the_columns_in_the_order_asked(tmp_path, read, file, split, columns):
    folder = write_pairs(tmp_path, 20)
    rows = pq.read_table(folder / f"{file}.parquet").to_pylist()
    names = columns or list(rows[0])
    expected = [{name: row[name] for name in names} for row in rows if split in (None, row["split"])]
    found = read(folder, split, columns)
    assert found.to_dicts() == expected and found.columns == names
