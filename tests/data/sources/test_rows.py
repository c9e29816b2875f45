"""Files of rows: every format gives the same column, counts what is missing, and refuses alike."""

import csv
import gzip
import io
import json

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from kanlm.data.sources.files import Files
from kanlm.data.sources.packing import CHUNK_BYTES
from kanlm.errors import UserError


def delimited(rows, delimiter=","):
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerow(["n", "text"])
    writer.writerows([number, "" if text is None else text] for number, text in enumerate(rows))
    return file.getvalue().encode()


def objects(rows):
    return [{"n": number, "text": text} for number, text in enumerate(rows)]


def parquet_bytes(rows):
    table = pyarrow.table({"n": range(len(rows)), "text": pyarrow.array(rows, pyarrow.string())})
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in objects(rows)).encode()


WRITERS = {
    "a.jsonl": lines,
    "a.ndjson": lines,
    "a.json": lines,
    "array.json": lambda rows: json.dumps(objects(rows)).encode(),
    "indented.json": lambda rows: json.dumps(objects(rows), indent=1).encode(),
    "row.json": lambda rows: "\n".join(json.dumps(o, indent=1) for o in objects(rows)).encode(),
    "a.csv": delimited,
    "a.tsv": lambda rows: delimited(rows, "\t"),
    "a.parquet": parquet_bytes,
    "a.pq": parquet_bytes,
}

ROWS = ["one", None, "zwei\r\nZeilen", 'a "quoted", field\twith tabs', "né 🦉", " ", "last"]


def read(root, **options):
    return [text for text, _ in Files(root, **options).read()]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_every_format_gives_the_same_rows(tmp_path, name, suffix):
    content = WRITERS[name](ROWS)
    if suffix and name.endswith(("parquet", "pq")):
        pytest.skip("parquet is packed inside")
    (tmp_path / (name + suffix)).write_bytes(gzip.compress(content) if suffix else content)
    assert read(tmp_path, path=name + suffix) == ROWS
    pairs = list(Files(tmp_path, path=name + suffix).read())
    assert list(Files(tmp_path, path=name + suffix).read(pairs[2][1])) == pairs[3:]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_a_stated_format_comes_before_the_suffix(tmp_path, kind):
    (tmp_path / "data.txt").write_bytes(WRITERS[f"a.{kind}"](["one", "two"]))
    assert read(tmp_path, path="data.txt", format=kind) == ["one", "two"]
    (tmp_path / "a.json").write_text("{}")
    assert read(tmp_path, path="a.json", format="text") == ["{}"]


text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=20)


@given(st.lists(text.filter(bool) | st.none(), min_size=1, max_size=8), st.sampled_from([*WRITERS]))
@settings(max_examples=150)
def test_any_text_comes_out_as_it_went_in(tmp_path_factory, rows, name):
    if not any(rows):
        rows = [*rows, "some"]
    root = tmp_path_factory.mktemp("rows")
    (root / name).write_bytes(WRITERS[name](rows))
    assert read(root, path=name) == rows


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_read_across_the_bounds_of_chunks(tmp_path, indent):
    rows = [f"{number} " + "é\\\n" * (number % 97) for number in range(9000)]
    rows[4000] = "x" * 3 * CHUNK_BYTES
    (tmp_path / "a.json").write_text(json.dumps(objects(rows), indent=indent))
    assert (tmp_path / "a.json").stat().st_size > 6 * CHUNK_BYTES
    assert read(tmp_path, path="a.json") == rows


def test_what_a_json_file_holds_is_said(tmp_path):
    for name, how in (
        ("a.json", "a line each"), ("array.json", "in an array"), ("row.json", "in a row")
    ):  # fmt: skip
        (tmp_path / name).write_bytes(WRITERS[name](["one"]))
        said = Files(tmp_path, path=name).describe()
        assert said == f"{name} (1 file, column text, JSON objects {how})"


def test_a_field_longer_than_the_csv_module_allows_is_read(tmp_path):
    (tmp_path / "a.csv").write_bytes(delimited(["x" * 300_000]))
    assert read(tmp_path, path="a.csv") == ["x" * 300_000]


@pytest.mark.parametrize("name", ["a.jsonl", "array.json", "a.parquet"])
def test_a_name_with_dots_is_a_column_or_else_leads_into_fields(tmp_path, name):
    def write(rows):
        if name == "a.parquet":
            parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
        elif name == "array.json":
            (tmp_path / name).write_text(json.dumps(rows))
        else:
            (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    nested = {"meta": {"text": "inside", "more": {"body": "deep"}}, "text": "top"}
    write([nested, {"meta": None, "text": "top"}])
    assert read(tmp_path, path=name, column="meta.text") == ["inside", None]
    assert read(tmp_path, path=name, column="meta.more.body") == ["deep", None]
    write([{**nested, "meta.text": "exact"}])
    assert read(tmp_path, path=name, column="meta.text") == ["exact"]
    write([{"a": {"b.c": "one"}, "a.b": {"c": "two"}}])
    with pytest.raises(UserError, match=r"column 'a\.b\.c' may be any of 2 fields"):
        read(tmp_path, path=name, column="a.b.c")
    with pytest.raises(UserError, match=r"no column 'a\.b\.d'"):
        read(tmp_path, path=name, column="a.b.d")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "text,text\na,b\n", "2 columns are named 'text'"),
        ("a.csv", "txt,n\na,1\n", "no column 'text'; did you mean 'txt'"),
        ("a.csv", "text;n\na;1\n", "no column 'text'; did you mean 'text;n'"),
        ("a.csv", "text,n\na\n", "line 2: 1 fields, expected the 2 of the first row"),
        ("a.csv", "text,n\na,1,2\n", "line 2: 3 fields"),
        ("a.csv", 'text,n\n"a,1\n', "line 2: malformed: unexpected end of data"),
        ("a.csv", 'text,n\n"a"b,1\n', "line 2: malformed: ',' expected after"),
        ("a.jsonl", '{"txt": "a"}\n', "no column 'text' in 1 row; did you mean 'txt'"),
        ("a.jsonl", '{"txt": "a"}\n' * 2000, "no column 'text' in 1000 rows; did you mean 'txt'"),
        ("a.jsonl", '[{"text": "a"}]\n', "line 1: expected a JSON object"),
        ("a.json", '[{"text": "a"} {"text": "b"}]', "malformed JSON: { after object 1"),
        ("a.json", '[{"text": "a"}, ]', "object 2: malformed JSON: Expecting value"),
        ("a.json", '[{"text": "a"}', "malformed JSON: the end of the file after object 1"),
        ("a.json", '[{"text": "a"}] []', "after object 1"),
        ("a.json", '[{"text": "a"}, {"text": "b]', "object 2: malformed JSON: Unterminated string"),
        ("a.json", '{\n"text": "a"\n}\nx', "object 2: malformed JSON: Expecting value"),
        ("a.json", '{"text": ["a", "b"]}', "column 'text' holds list, expected text"),
        ("a.json", '{"train": [{"text": "a"}]}', "no column 'text' in 1 row"),
        ("a.json", "some prose", "expected JSON objects, a line each or in an array"),
        ("a.json", "", "expected JSON objects, a line each or in an array"),
        ("a.json", '[1, 2]', "object 1: expected a JSON object"),
        ("a.json", "[" * 100_000, "object 1: cannot be read"),
    ],
)  # fmt: skip
def test_bad_rows_are_refused_with_their_place(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name}.*({said})") as caught:
        read(tmp_path, path=name)
    assert " at at " not in str(caught.value)


def test_a_malformed_array_is_not_read_to_its_end_first(tmp_path):
    (tmp_path / "a.json").write_bytes(b'[{"text" "a"}, ' + b" " * 64 * CHUNK_BYTES)
    source = Files(tmp_path, path="a.json").read()
    with pytest.raises(UserError, match="Expecting ':' delimiter"):
        next(source)


def test_columns_of_one_name_are_refused_in_parquet(tmp_path):
    arrays = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    parquet.write_table(
        pyarrow.Table.from_arrays(arrays, names=["text", "text"]), tmp_path / "a.parquet"
    )
    with pytest.raises(UserError, match="2 columns are named 'text'"):
        read(tmp_path, path="a.parquet")


def test_bytes_that_are_no_text_are_refused_in_parquet(tmp_path):
    # Arrow takes the caller's word that these are UTF-8.
    bad = pyarrow.array([b"one", b"\xc3("]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": bad}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet, after row 0: not UTF-8: .*0xc3"):
        read(tmp_path, path="a.parquet")
