import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.sources import BadRow, Row, read_file
from pipeline.errors import RequestError


def read(path):
    return list(read_file(path.parent, path.name))


def test_jsonl_rows_carry_their_line_and_blank_lines_are_passed_over(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n  \r\n{"a": "\xc3\xa9"}\r\n{"a": 3}')
    assert read(path) == [
        Row("rows.jsonl:1", {"a": 1}),
        Row("rows.jsonl:4", {"a": "é"}),
        Row("rows.jsonl:5", {"a": 3}),
    ]


def test_a_byte_order_mark_is_not_part_of_the_first_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n')
    assert read(path) == [Row("rows.jsonl:1", {"a": 1})]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": "\xff"}', "invalid UTF-8 at byte 7 of the line (0xff)"),
        (b'{"a": 1', "invalid JSON at column 8: Expecting ',' delimiter"),
        (b"[1, 2]", "expected a JSON object, found list"),
        (b'"text"', "expected a JSON object, found str"),
        (rb'{"a": "\ud83d"}', "stands alone"),
        (rb'{"\uDe00": "a"}', "stands alone"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    ],
)
def test_an_unreadable_line_is_one_bad_row_and_the_rest_is_read(tmp_path, line, reason):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 3}\n')
    first, bad, last = read(path)
    assert isinstance(bad, BadRow) and bad.where == "rows.jsonl:2" and reason in bad.reason
    assert [first.values, last.values] == [{"a": 1}, {"a": 3}]


def test_a_whole_surrogate_pair_is_good_json(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"a": "🙂"}) + "\n")  # json writes it as two escapes
    assert read(path) == [Row("rows.jsonl:1", {"a": "🙂"})]


def test_parquet_rows_count_from_zero_across_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.data.sources.BATCH_ROWS", 2)
    pq.write_table(pa.table({"a": [1, 2, 3], "m": [[{"role": "user"}]] * 3}), tmp_path / "rows.parquet")
    rows = read(tmp_path / "rows.parquet")
    assert [row.where for row in rows] == ["rows.parquet[0]", "rows.parquet[1]", "rows.parquet[2]"]
    assert rows[2].values == {"a": 3, "m": [{"role": "user"}]}


def test_invalid_utf8_in_parquet_is_one_bad_row(tmp_path):
    raw = pa.array([b"good", b"ba\xffd", b"fine"], type=pa.binary())
    texts = pa.Array.from_buffers(pa.string(), 3, raw.buffers())  # as careless writers do
    pq.write_table(pa.table({"a": texts}), tmp_path / "rows.parquet")
    first, bad, last = read(tmp_path / "rows.parquet")
    assert (first.values["a"], last.values["a"]) == ("good", "fine")
    assert bad == BadRow("rows.parquet[1]", "invalid UTF-8 in a text column (0xff)")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.jsonl", None, "does not exist"),
        ("empty.jsonl", b"", "is empty"),
        ("blank.jsonl", b"\n \n", "is empty"),
        ("table.csv", b"a,b\n", "unknown extension '.csv'"),
        ("broken.parquet", b"PAR1 no table", "not a readable Parquet file"),
    ],
)
def test_a_file_that_cannot_be_read_is_a_wrong_request(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=message):
        read(tmp_path / name)


def test_a_missing_file_error_lists_what_there_is(tmp_path):
    (tmp_path / "pears.jsonl").write_text("{}")
    with pytest.raises(RequestError, match=r"it holds pears\.jsonl"):
        read(tmp_path / "pairs.jsonl")


def test_a_parquet_file_without_rows_is_empty(tmp_path):
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), tmp_path / "none.parquet")
    with pytest.raises(RequestError, match="is empty"):
        read(tmp_path / "none.parquet")
