"""Reading files that may be damaged or come from anybody: whole and plain, or refused in a line."""

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from kanlm.errors import UserError, first_line


def read_bytes(path: Path) -> bytes:
    """Read a file that lies where it says.

    Raises:
        UserError: it cannot be read, is not an ordinary file, or is a link that leads out of its
            folder, by which a folder from anybody could read other files.
    """
    try:
        check_plain(path)
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def check_plain(path: Path) -> None:
    """Check that a file is an ordinary one in its own folder.

    Raises:
        UserError: it is not.
        OSError: it cannot be looked at.
    """
    path.stat()
    if path.is_symlink() and path.resolve().parent != path.parent.resolve():
        raise UserError(f"{path} is a link that leads out of its folder")
    if not path.is_file():
        # A pipe would be waited for.
        raise UserError(f"{path} is no ordinary file")


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        UserError: see `read_bytes`, or it is not UTF-8.
    """
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None


def read_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file.

    Raises:
        UserError: see `read_bytes`, or it holds no JSON object of finite numbers.
    """
    try:
        return parse_object(read_bytes(path), finite=True)
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None


def parse_object(text: bytes, *, finite: bool) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        finite: whether to refuse what JSON has no word for: NaN and infinities.

    Raises:
        ValueError: it is not one.
    """
    try:
        value = json.loads(
            text.decode(),
            parse_constant=_refuse if finite else None,
            parse_float=_finite if finite else None,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    if b"\\ud" in text.lower():
        # Half of a pair of escapes is a character that can be written nowhere.
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits[:20]} is too large a number")
    return number
