"""Local files: formats, compression, bounded memory, and what is said of bad ones."""

import bz2
import gzip
import json
import lzma
import os
import tracemalloc
from itertools import chain
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from kanlm.data.sources import make_source
from kanlm.data.sources.files import Files
from kanlm.data.sources.packing import CHUNK_BYTES
from kanlm.data.sources.text import separated
from kanlm.errors import UserError

COMPRESSORS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
}


def parquet_file():
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"text": ["one"]}), sink)
    return sink.getvalue().to_pybytes()


def texts(root, **options):
    return list(Files(root, **options).documents())


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_text_and_jsonl_are_read_compressed_or_not(tmp_path, suffix):
    pack = COMPRESSORS[suffix]
    (tmp_path / f"a.txt{suffix}").write_bytes(pack("né\n--\nzwei\n".encode()))
    lines = [json.dumps({"body": "né", "n": 1}), "", json.dumps({"body": "zwei"})]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack("\n".join(lines).encode()))
    assert texts(tmp_path, path=f"a.txt{suffix}") == ["né\n--\nzwei\n"]
    assert texts(tmp_path, path=f"a.txt{suffix}", separator="--\n") == ["né\n", "zwei\n"]
    assert texts(tmp_path, path=f"a.jsonl{suffix}", column="body") == ["né", "zwei"]


def test_parquet_gives_its_column_and_skips_nulls(tmp_path):
    table = pyarrow.table({"text": ["né", None, "zwei"], "n": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert texts(tmp_path, path="a.parquet") == ["né", "zwei"]


def test_globs_are_sorted_and_go_down_folders(tmp_path):
    for name in ("b.txt", "a.txt", "deep/er/c.txt", "d.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(tmp_path, path="*.txt") == ["a.txt", "b.txt"]
    assert texts(tmp_path, path="**/*.txt") == ["a.txt", "b.txt", "deep/er/c.txt"]
    assert texts(tmp_path, path=["b.txt", "*.txt"]) == ["b.txt", "a.txt"]


def test_a_name_that_looks_like_a_glob_is_taken_as_it_is(tmp_path):
    (tmp_path / "a[1].txt").write_text("one")
    assert texts(tmp_path, path="a[1].txt") == ["one"]


def test_a_file_is_read_once_by_whatever_names(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").symlink_to("a.txt")
    # A folder that leads back into itself.
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)
    paths = ["*.txt", str(tmp_path / "a.txt"), "**/*.txt", "deep/../b.txt"]
    assert texts(tmp_path, path=paths) == ["one"]


def test_the_root_is_no_glob(tmp_path):
    root = tmp_path / "seed[0]"
    root.mkdir()
    (root / "a.txt").write_text("one")
    assert texts(root, path="*.txt") == texts(root, path=str(root / "a.txt")) == ["one"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffné\n".encode())
    assert texts(tmp_path, path="a.txt") == ["né\n"]


@given(st.lists(st.text("ab|", max_size=6), max_size=6), st.sampled_from(["|", "||", "ab", "aba"]))
def test_dividing_chunks_is_dividing_the_whole(chunks, separator):
    assert list(separated(iter(chunks), separator)) == "".join(chunks).split(separator)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_memory_is_bounded_by_a_document(tmp_path, name):
    document = "word " * 200
    row = json.dumps({"text": document}) + "\n" if name == "a.jsonl" else document + "\n\n"
    (tmp_path / name).write_text(row * 20_000)
    assert (tmp_path / name).stat().st_size > 18 * CHUNK_BYTES
    separator = "\n\n" if name == "a.txt" else None
    source = Files(tmp_path, path=name, separator=separator)
    tracemalloc.start()
    count = sum(1 for _ in source.documents())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 6 * CHUNK_BYTES


def test_reading_goes_on_from_a_cursor_without_opening_files_before_it(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("1|2|3")
    source = Files(tmp_path, path="*.txt", separator="|")
    pairs = list(source.read())
    (tmp_path / "a.txt").write_bytes(b"\xff")
    assert list(source.read(pairs[3][1])) == pairs[4:]


def test_the_fingerprint_follows_size_time_and_options(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    first = Files(tmp_path, path="a.txt").fingerprint()
    assert Files(tmp_path, path="*.txt").fingerprint() == first
    assert Files(tmp_path, path="a.txt", separator="|").fingerprint() != first
    path.write_text("two!")
    assert Files(tmp_path, path="a.txt").fingerprint() != first


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_undecodable_bytes_are_refused_with_their_place(tmp_path, suffix):
    good = b"x" * (CHUNK_BYTES - 1) + "é".encode()
    path = tmp_path / f"bad.txt{suffix}"
    path.write_bytes(COMPRESSORS[suffix](good + b"\xff and more"))
    with pytest.raises(UserError, match=rf"bad\.txt.*not UTF-8: byte {len(good)}.* is 0xff"):
        texts(tmp_path, path=path.name)


def test_a_character_cut_off_at_the_end_is_refused(tmp_path):
    (tmp_path / "cut.txt").write_bytes("abcé".encode()[:-1])
    with pytest.raises(UserError, match="byte 3 is 0xc3"):
        texts(tmp_path, path="cut.txt")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "a"', "malformed JSON: Expecting ',' delimiter at column 13"),
        (b'{"text": "a', "malformed JSON: Unterminated string starting at column 10"),
        (b"[1]", "expected a JSON object"),
        (b'{"text": 3}', "column 'text' holds int, expected text"),
        (b'{"text": "\xff"}', "not UTF-8: byte 10 of the line is 0xff"),
        (rb'{"text": "\ud800"}', "column 'text' holds half a character"),
    ],
)
def test_malformed_jsonl_is_refused_with_file_and_line(tmp_path, line, said):
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=rf"bad\.jsonl, line 3: {said}"):
        texts(tmp_path, path="bad.jsonl")


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_a_damaged_archive_is_refused(tmp_path, suffix, damage):
    packed = bytearray(COMPRESSORS[suffix](bytes(range(97, 123)) * 4000))
    packed = packed[: len(packed) // 2] if damage == "cut" else b"no archive" + packed
    (tmp_path / f"bad.txt{suffix}").write_bytes(packed)
    with pytest.raises(UserError, match=r"bad\.txt.*cannot be read"):
        texts(tmp_path, path=f"bad.txt{suffix}")


def test_bad_parquet_is_refused(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but not really PAR1")
    with pytest.raises(UserError, match=r"bad\.parquet: cannot be read as parquet"):
        texts(tmp_path, path="bad.parquet")
    parquet.write_table(pyarrow.table({"text": [1], "body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet, row 1: column 'text' holds int"):
        texts(tmp_path, path="a.parquet")
    with pytest.raises(UserError, match="no column 'bodi'; did you mean 'body'"):
        texts(tmp_path, path="a.parquet", column="bodi")
    (tmp_path / "a.parquet.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"decompress it to \.parquet"):
        texts(tmp_path, path="a.parquet.gz")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"path": "missing.txt"}, "path = 'missing.txt': no such file"),
        ({"path": "*.csv"}, r"path = '\*.csv': no such file"),
        ({"path": "folder"}, r"a folder; .*write 'folder/\*\*/\*'"),
        ({"path": []}, "path is empty"),
        ({"path": "a.txt", "separator": ""}, "separator = ''"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, options, said):
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match=said):
        Files(tmp_path, **options)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 20))
def test_parts_join_to_all_documents_and_share_the_bytes(tmp_path_factory, counts, parts):
    root = tmp_path_factory.mktemp("parts")
    for number, count in enumerate(counts):
        (root / f"{number:02d}.txt").write_text("".join(f"{number}.{i}|" for i in range(count)))
    source = Files(root, path="*.txt", separator="|")
    found = [list(source.part(index, parts)) for index in range(parts)]
    assert list(chain.from_iterable(found)) == [text for text, _ in source.read()]
    # No part is larger than its share by more than a file.
    sizes = [path.stat().st_size for path in source.files]
    for part in found:
        assert sum(len(text or "") for text in part) <= sum(sizes) / parts + max(sizes)


def test_line_ends_of_text_are_newlines_as_open_reads_them(tmp_path):
    content = "one\r\ntwo\r\n\r\nthree\rfour\n" + "x\r\n" * CHUNK_BYTES
    (tmp_path / "a.txt").write_bytes(content.encode())
    expected = (tmp_path / "a.txt").read_text()
    assert "\r" not in expected
    assert texts(tmp_path, path="a.txt") == ["".join(Files(tmp_path, path="a.txt").chunks())]
    assert texts(tmp_path, path="a.txt") == [expected]
    for separator in ("\n\n", "\r\n\r\n"):
        divided = Files(tmp_path, path="a.txt", separator=separator)
        assert list(divided.documents()) == expected.split("\n\n")
        assert divided.notes() == [r"line ends \r\n and \r are read as \n"]


def test_a_separator_that_divides_nothing_is_noted(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (note,) = Files(tmp_path, path="a.txt", separator="%%").notes()
    assert note == "the separator '%%' divides nothing: it is one document"
    assert Files(tmp_path, path="a.txt", separator="\n\n").notes() == []


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("a.txt", {"column": "text"}, r"column = 'text': .*a\.txt is read as text"),
        ("a.*", {"column": "body"}, r"column = 'body': .*a\.txt is read as text"),
        ("a.jsonl", {"separator": "--"}, r"separator = '--': .*a\.jsonl is read as jsonl"),
        ("a.csv", {"separator": "--"}, r"separator = '--': .*a\.csv is read as csv"),
        ("a.txt", {"format": "xml"}, "data.sources.files.format"),
        ("b.tar", {}, r"\.tar is not read; unpack it"),
        ("b.tar.gz", {}, r"\.tar is not read; unpack it"),
        ("b.txt.lz4", {}, r"\.lz4 is not read; pack it by zstd or gzip"),
        ("b.arrow", {}, r"\.arrow is not read; convert it to parquet or JSONL"),
    ],
)
def test_what_a_source_cannot_use_is_refused(tmp_path, name, options, said):
    for each in ("a.txt", "a.jsonl", "a.csv", "b.tar", "b.tar.gz", "b.txt.lz4", "b.arrow"):
        (tmp_path / each).write_text("x")
    with pytest.raises(UserError, match=said):
        make_source({"kind": "files", "path": name, **options}, tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"text": "one"}\n{"text": "two"}\n', "begins with a JSON object; state format: jsonl"),
        (parquet_file(), "begins like parquet: state format: parquet"),
        (gzip.compress(b"one", mtime=0), r"packed by gzip: let its name end in \.gz"),
        (bz2.compress(b"one"), r"packed by bzip2: let its name end in \.bz2"),
        (lzma.compress(b"one"), r"packed by xz: let its name end in \.xz"),
        (COMPRESSORS[".zst"](b"one"), r"packed by zstd: let its name end in \.zst"),
        ("one".encode("utf-16"), "UTF-16: convert it"),
        ("one".encode("utf-16-le"), "no text, or UTF-16: byte 1 is 0x00"),
        (b"x" * CHUNK_BYTES + b"one\0two", f"no text, or UTF-16: byte {CHUNK_BYTES + 3} is 0x00"),
    ],
)
@pytest.mark.parametrize("separator", [None, "\n"])
def test_text_that_holds_something_else_is_refused(tmp_path, content, said, separator):
    (tmp_path / "part-0001").write_bytes(content)
    with pytest.raises(UserError, match=rf"part-0001: .*{said}"):
        texts(tmp_path, path="part-0001", separator=separator)


def test_code_that_begins_with_a_brace_is_text(tmp_path):
    for number, line in enumerate(("{}", "{ let x = 1; }", "{{ jinja }}", '{"cut')):
        (tmp_path / f"{number}.js").write_text(line + "\nmore")
        assert texts(tmp_path, path=f"{number}.js") == [line + "\nmore"]


def test_files_that_differ_in_content_alone_are_told_apart(tmp_path):
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.txt").write_text(f"{name} " * 9000)
        os.utime(tmp_path / name / "train.txt", ns=(10**18, 10**18))
        found.append(Files(tmp_path, path=f"{name}/train.txt").fingerprint())
    assert found[0] != found[1]


def test_several_files_are_named_after_the_folder_that_holds_them(tmp_path: Path):
    for name in ("law/a.txt", "law/old/b.txt", "prose.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    assert Files(tmp_path, path="law/**/*.txt").label == "law"
    assert Files(tmp_path, path="prose.txt").label == "prose"
