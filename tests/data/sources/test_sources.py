"""The registry, and the short names of the command line."""

import pytest

from kanlm.data.sources import check_source, make_source, parse_source_argument
from kanlm.errors import UserError


def test_paths_are_read_from_the_root(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    source = make_source({"kind": "files", "path": "a.txt", "weight": 3}, tmp_path)
    assert list(source.documents()) == ["hello"]
    assert source.single_document


def test_blank_documents_do_not_make_a_source_more_than_one(tmp_path):
    (tmp_path / "a.txt").write_text("hello|  |")
    spec = {"kind": "files", "path": "a.txt", "separator": "|"}
    assert make_source(spec, tmp_path).single_document


def test_defaults_are_filled_in():
    assert check_source({"kind": "files", "path": "a"}) == {
        "kind": "files",
        "weight": 1.0,
        "path": "a",
        "format": None,
        "column": None,
        "separator": None,
    }


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({}, "a source has no kind; expected one of: stdlib-prose"),
        ({"kind": "stdlib-pros"}, "unknown kind 'stdlib-pros'; did you mean 'stdlib-prose'"),
        ({"kind": "a.txt"}, r"'a.txt' is a path, no kind; write \{kind: files, path: a.txt\}"),
        ({"kind": "files", "path": "a", "colum": "a"}, "'data.sources.files.colum'; did you mean"),
        ({"kind": "files"}, "setting 'data.sources.files.path' is missing"),
        ({"kind": "files", "path": 3}, "data.sources.files.path.* = 3"),
        ({"kind": "stdlib-code", "path": "a"}, "unknown setting 'data.sources.stdlib-code.path'"),
    ],
)
def test_a_bad_spec_is_refused(tmp_path, spec, said):
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(UserError, match=said):
        make_source(spec, tmp_path)


def test_short_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("hello")
    assert parse_source_argument("stdlib-code") == {"kind": "stdlib-code"}
    assert parse_source_argument("hub:me/it") == {"kind": "hub", "name": "me/it"}
    for text in ("a.txt", "*.txt", str(tmp_path / "a.txt")):
        spec = parse_source_argument(text)
        assert list(make_source(spec, "/elsewhere").documents()) == ["hello"]
    with pytest.raises(UserError, match=r"'stdlib-cod': .*did you mean 'stdlib-code'"):
        parse_source_argument("stdlib-cod")
    with pytest.raises(UserError, match=r"'b.txt': no such file"):
        parse_source_argument("b.txt")
    with pytest.raises(UserError, match="expected hub:NAME"):
        parse_source_argument("hub:")


def test_a_source_without_a_division_is_whole_in_its_first_part():
    source = make_source({"kind": "stdlib-code"})
    assert list(source.part(0, 3)) == [text for text, _ in source.read()]
    assert list(source.part(1, 3)) == list(source.part(2, 3)) == []


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, whose name looks like a glob, and the user's beside it."""
    for name in ("here[1]", "home"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name[:4]}.txt").write_text(name)
    monkeypatch.chdir(tmp_path / "here[1]")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("a[2].txt", "b.txt", "[c, d].txt"):
        (tmp_path / "here[1]" / name).write_text(name)
    return tmp_path / "here[1]"


@pytest.mark.parametrize(
    ("argument", "found"),
    [
        ("a[2].txt", ["a[2].txt"]),
        ("[c, d].txt", ["[c, d].txt"]),
        ("[ab]*.txt", ["a[2].txt", "b.txt"]),
        ("./b.txt", ["b.txt"]),
        ("~/home.txt", ["home"]),
        ("~/*.txt", ["home"]),
        ("[b.txt, 'a[[]2].txt', ~/*.txt]", ["b.txt", "a[2].txt", "home"]),
        ("{kind: files, path: b.txt, separator: .}", ["b", "txt"]),
        ("{kind: files, path: [b.txt, '[a]*']}", ["b.txt", "a[2].txt"]),
    ],
)
def test_the_command_line_names_what_a_config_names(here, argument, found):
    spec = parse_source_argument(argument)
    assert list(make_source(spec, "/elsewhere").documents()) == found
    in_config = spec["path"] if isinstance(spec["path"], list) else [spec["path"]]
    assert all(path.startswith("/") for path in in_config)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("", "source '': no such file"),
        ("[b.txt, missing.txt]", "missing.txt': no such file"),
        ("[]", "path is empty"),
        ("{kind: files, pth: b.txt}", "unknown setting 'source.files.pth'; did you mean 'path'"),
        ("{path: b.txt}", "source: a source has no kind"),
        ("[b.txt", "source=.b.txt"),
        (".", r"'.': a folder; write './\*\*/\*'"),
    ],
)
def test_what_the_command_line_cannot_mean_is_refused(here, argument, said):
    with pytest.raises(UserError, match=said):
        parse_source_argument(argument)


def test_a_source_tells_the_files_it_reads(here):
    spec = parse_source_argument("*.txt")
    names = ["[c, d].txt", "a[2].txt", "b.txt", "here.txt"]
    assert make_source(spec).local_files() == [here / name for name in names]
    assert make_source({"kind": "stdlib-code"}).local_files() == []
