"""Only whole, plain files are read, and only JSON that JSON knows."""

import os
from pathlib import Path

import pytest

from kanlm.errors import UserError
from kanlm.untrusted_io import parse_object, read_bytes, read_object, read_text


def test_a_link_may_lead_within_its_folder_and_not_out_of_it(tmp_path: Path):
    place = tmp_path / "run"
    place.mkdir()
    (place / "file").write_bytes(b"ours")
    (tmp_path / "secret").write_bytes(b"theirs")
    (place / "within").symlink_to("file")
    (place / "out").symlink_to(tmp_path / "secret")
    (place / "loop").symlink_to("loop")
    (tmp_path / "elsewhere").symlink_to(place)
    assert read_bytes(place / "within") == b"ours"
    # A folder may be put on another disk.
    assert read_bytes(tmp_path / "elsewhere" / "file") == b"ours"
    with pytest.raises(UserError, match="out is a link that leads out of its folder"):
        read_bytes(place / "out")
    with pytest.raises(UserError, match="loop"):
        read_bytes(place / "loop")


def test_a_pipe_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is no ordinary file"):
        read_bytes(tmp_path / "pipe")
    with pytest.raises(UserError, match="is no ordinary file"):
        read_bytes(tmp_path)


def test_what_is_not_there_or_no_text_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="gone cannot be read: No such file or directory"):
        read_text(tmp_path / "gone")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="latin cannot be read: 'utf-8' codec"):
        read_text(tmp_path / "latin")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "Expecting value"),
        (b'{"a": 1', "Expecting"),
        (b"[1]", "it holds no JSON object"),
        (b'{"a": \xff}', "codec can't decode"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": -Infinity}', "-Infinity is no number"),
        (b'{"a": 1e999}', "1e999 is too large a number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": "\\ud800"}', "surrogates not allowed"),
    ],
    ids=lambda value: value[:20] if isinstance(value, bytes) else None,
)
def test_what_is_no_object_of_finite_numbers_is_refused(content: bytes, said: str, tmp_path: Path):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_object(path)
    line = str(caught.value)
    assert line.startswith(f"{path} cannot be read: ")
    assert said in line
    assert "\n" not in line


def test_an_object_is_what_json_makes_of_it():
    text = '{"a": [1, 2.5, null, true], "é": "\\ud83d\\ude00"}'.encode()
    assert parse_object(text, finite=True) == {"a": [1, 2.5, None, True], "é": "😀"}
    assert parse_object(b'{"a": Infinity}', finite=False)["a"] == float("inf")
