"""Whatever happens to a file of a sealed folder is found."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from kanlm.checksums import find_damage, write_checksums


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    (tmp_path / "a.bin").write_bytes(bytes(range(256)))
    (tmp_path / "b.json").write_text("{}")
    (tmp_path / "empty").touch()
    write_checksums(tmp_path)
    assert find_damage(tmp_path) is None
    return tmp_path


@pytest.mark.parametrize("name", ["a.bin", "b.json", "empty", "index.json"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content + b" ", "bytes, not|damaged"),
        (lambda content: content[:-1], "bytes, not|damaged"),
        (lambda content: content[:-1] + bytes([(content or b" ")[-1] ^ 4]), "checksum|bytes|dam"),
        (None, "is missing"),
    ],
    ids=["longer", "shorter", "flipped", "gone"],
)
def test_a_changed_file_is_named(
    sealed: Path, name: str, change: Callable[[bytes], bytes] | None, said: str
):
    path = sealed / name
    if change is None:
        path.unlink()
    else:
        before = path.read_bytes()
        path.write_bytes(change(before))
        if path.read_bytes() == before:
            pytest.skip("nothing to shorten")
    problem = find_damage(sealed)
    assert problem is not None
    assert problem.startswith(name)
    assert any(word in problem for word in said.split("|"))


def test_every_byte_of_the_index_counts(sealed: Path):
    index = sealed / "index.json"
    content = index.read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        index.write_bytes(changed)
        assert find_damage(sealed) is not None, place


def test_a_file_that_was_put_there_is_named(sealed: Path):
    (sealed / "more.pkl").touch()
    assert find_damage(sealed) == "more.pkl is not in index.json"


class TooLongError(Exception):
    """Reading did not end."""


@pytest.mark.parametrize("kind", ["pipe", "endless"])
def test_what_is_no_file_is_not_read_for_ever(tmp_path: Path, kind: str):
    """Where somebody put a pipe, or a link to a device, in place of a file."""
    (tmp_path / "w").write_text("w")
    write_checksums(tmp_path)
    (tmp_path / "w").unlink()
    if kind == "pipe":
        os.mkfifo(tmp_path / "w")
    else:
        (tmp_path / "w").symlink_to("/dev/zero")

    def end(*_: object) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, 1)
    try:
        assert find_damage(tmp_path) is not None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
