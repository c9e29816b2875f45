"""Checksums of files, and a folder's index: size and SHA-256 of each file, written last.

A faulty disk, an incomplete copy, a flipped bit and an added file are found before anything is
read from the folder.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from kanlm.errors import UserError
from kanlm.untrusted_io import check_plain

INDEX = "index.json"
FORMAT_VERSION = 1


#: Of a file: its size and checksum.
FileFacts = dict[str, Any]


def file_sha256(path: Path) -> str:
    """The hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_facts(path: Path) -> FileFacts:
    """Read a file for what the index says of it.

    Raises:
        UserError: it is no ordinary file.
    """
    check_plain(path)
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def write_checksums(folder: Path, known: Mapping[str, FileFacts] | None = None) -> None:
    """Write `index.json` over all files in the folder.

    Args:
        known: file name → its facts, of those that need not be read for them again.
    """
    (folder / INDEX).write_text(_text(_files(folder, known or {})))


def find_damage(folder: Path, beside: Collection[str] = ()) -> str | None:
    """What is wrong with a sealed folder, in words, or None if it is as it was sealed.

    Args:
        beside: names of what may have been put there since.
    """
    try:
        check_plain(folder / INDEX)
        text = (folder / INDEX).read_bytes()
        found = _files(folder, {}, beside)
        if text == _text(found).encode():
            return None
        return _difference(json.loads(text)["files"], found)
    except FileNotFoundError:
        return f"{INDEX} is missing"
    except OSError as error:
        return f"{Path(str(error.filename)).name} cannot be read: {error.strerror}"
    except UserError as error:
        return str(error)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{INDEX} is damaged"


def _files(
    folder: Path, known: Mapping[str, FileFacts], beside: Collection[str] = ()
) -> dict[str, FileFacts]:
    unlisted = {INDEX, *beside}
    names = sorted(path.name for path in folder.iterdir() if path.name not in unlisted)
    return {name: known[name] if name in known else file_facts(folder / name) for name in names}


def _text(files: dict[str, FileFacts]) -> str:
    return json.dumps({"format_version": FORMAT_VERSION, "files": files}, indent=1)


def _difference(listed: dict[str, FileFacts], found: dict[str, FileFacts]) -> str:
    """Say of the first file that is not as listed how it differs."""
    for name, facts in listed.items():
        if name not in found:
            return f"{name} is missing"
        if found[name]["bytes"] != facts["bytes"]:
            return f"{name} holds {found[name]['bytes']} bytes, not {facts['bytes']}"
        if found[name]["sha256"] != facts["sha256"]:
            return f"{name} does not match its checksum"
    for name in found:
        if name not in listed:
            return f"{name} is not in {INDEX}"
    return f"{INDEX} is damaged"
