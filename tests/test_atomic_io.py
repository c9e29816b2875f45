"""Files and folders appear whole, or not at all."""

import os
import stat
from pathlib import Path

import pytest

from kanlm.atomic_io import atomic_folder, write_text
from kanlm.errors import UserError


@pytest.fixture
def group_readable():
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_all_files_of_a_folder_get_the_users_mode(tmp_path: Path, group_readable) -> None:
    """Also those that a library wrote for the owner alone, as safetensors does."""
    with atomic_folder(tmp_path / "model") as draft:
        (draft / "sub").mkdir()
        (draft / "sub" / "weights").touch(mode=0o600)
        (draft / "config").write_text("{}")
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "model").rglob("*")}
    assert modes == {"sub": 0o750, "weights": 0o640, "config": 0o640}


def test_an_error_leaves_the_old_folder_and_no_draft(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "model") as draft:
        (draft / "config").write_text("old")

    def write_half() -> None:
        with atomic_folder(tmp_path / "model") as draft:
            (draft / "config").write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert (tmp_path / "model" / "config").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_text_is_replaced_in_one_move(tmp_path: Path) -> None:
    write_text(tmp_path / "deep" / "a.txt", "one")
    write_text(tmp_path / "deep" / "a.txt", "two")
    assert [p.read_text() for p in (tmp_path / "deep").iterdir()] == ["two"]


def test_a_link_under_a_drafts_name_is_not_written_through(tmp_path: Path) -> None:
    """Somebody else's folder must not make us write in a third place."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    place = tmp_path / "run"
    place.mkdir()
    (place / ".a.txt.draft").symlink_to(victim)
    (place / ".model.draft").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    write_text(place / "a.txt", "new")
    with atomic_folder(place / "model") as draft:
        (draft / "config").write_text("new")
    assert victim.read_text() == "precious"
    assert not list((tmp_path / "elsewhere").iterdir())
    assert (place / "a.txt").read_text() == (place / "model" / "config").read_text() == "new"
    (place / "linked").symlink_to(tmp_path / "elsewhere")

    def write() -> None:
        with atomic_folder(place / "linked") as draft:
            (draft / "config").write_text("new")

    with pytest.raises(UserError, match="linked cannot be written: it is a link"):
        write()


def test_a_read_only_folder_is_said_in_one_line(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)

    def write() -> None:
        with atomic_folder(tmp_path / "model") as draft:
            (draft / "config").touch()

    try:
        for attempt in (write, lambda: write_text(tmp_path / "a.txt", "a")):
            with pytest.raises(UserError, match="cannot be written: Permission denied"):
                attempt()
    finally:
        tmp_path.chmod(0o700)
