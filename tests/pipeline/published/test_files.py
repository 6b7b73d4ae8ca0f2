import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import RequestError
from pipeline.published.files import BadRow, Row, find_files, read_file


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
    monkeypatch.setattr("pipeline.published.files.BATCH_ROWS", 2)
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
        ("table.csv", b"a,b\n", "is empty"),
        ("table.xlsx", b"PK", "unknown extension '.xlsx'"),
        ("table.csv.gz", b"no gzip", "can't be read as csv"),
        ("rows.json", b'[{"a": 1}, {"a": 2}', "it ends before its array does"),
        ("rows.json", b'[{"a": 1}, oops]', "not readable as an array of JSON objects"),
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


ROWS = [{"a": number, "text": "é\n" * number} for number in range(5)]


def pack(name: str, content: bytes) -> bytes:
    if name.endswith(".gz"):
        return gzip.compress(content)
    return pa.compress(content, "zstd", asbytes=True) if name.endswith(".zst") else content


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_the_same_rows_come_out_of_every_format(tmp_path, packed):
    lines = "\n".join(map(json.dumps, ROWS))
    for name, content in (
        ("lines.jsonl", lines),
        ("array.json", json.dumps(ROWS, indent=1)),
        ("array.jsonl", "\ufeff " + json.dumps(ROWS)),
        ("lines.json", lines),
    ):
        path = tmp_path / (name + packed)
        path.write_bytes(pack(path.name, content.encode()))
        assert [row.values for row in read(path)] == ROWS


def test_arrays_are_read_across_pieces_and_name_the_element(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.published.files._CHUNK", 7)
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([*ROWS, 3, {"half": "\ud83d"}]))
    *rows, number, half = read(path)
    assert [row.values for row in rows] == ROWS and rows[4].where == "rows.json[4]"
    assert number == BadRow("rows.json[5]", "expected a JSON object, found int")
    assert "stands alone" in half.reason


def test_csv_cells_are_texts_and_an_empty_one_is_none(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,chosen,rejected\n"2, or 2?\n",4,\nonly,two\n')
    first, bad = read(path)
    assert first.values == {"prompt": "2, or 2?\n", "chosen": "4", "rejected": None}
    assert isinstance(bad, BadRow) and "another number of cells" in bad.reason


def test_columns_that_hold_json_are_decoded_however_deep(tmp_path):
    """datasets writes columns of mixed forms so: an extension type over text."""
    text = pa.array(['"Say hi"', '[{"role": "user", "content": "2+2?"}]', None])
    column = pa.ExtensionArray.from_storage(pa.json_(pa.string()), text)
    lists = pa.ListArray.from_arrays([0, 1, 2, 3], column)
    nested = pa.StructArray.from_arrays([lists, pa.array([1, 2, 3])], ["l", "n"])
    pq.write_table(pa.table({"prompt": column, "deep": nested}), tmp_path / "rows.parquet")
    values = [row.values for row in read(tmp_path / "rows.parquet")]
    decoded = ["Say hi", [{"role": "user", "content": "2+2?"}], None]
    assert [row["prompt"] for row in values] == decoded
    assert [row["deep"] for row in values] == [{"l": [item], "n": n + 1} for n, item in enumerate(decoded)]


def test_patterns_and_folders_mean_their_files_in_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl.gz", "more/c.csv", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert find_files(tmp_path, "*.jsonl*") == ["a.jsonl.gz", "b.jsonl"]
    assert find_files(tmp_path, "more") == ["more/c.csv"]
    assert find_files(tmp_path, ".") == ["a.jsonl.gz", "b.jsonl", "more/c.csv"]
    assert find_files(tmp_path, "absent.jsonl") == ["absent.jsonl"]  # read_file says so
    with pytest.raises(RequestError, match=r"matches no file that prepare reads .*holds a\.jsonl\.gz, b\.jsonl, more"):
        find_files(tmp_path, "*.parquet")
