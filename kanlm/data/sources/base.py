"""What every source of documents offers."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: A place between two documents, as JSON: where an interrupted reading resumes.
Cursor = dict[str, Any]


class Source(ABC):
    """An ordered series of documents that can be read again from any place in it.

    A subclass's options are the keyword-only arguments of its `__init__`.

    Args:
        root: folder against which relative paths are read.
    """

    #: Short name, fit for a folder.
    label: str

    def __init__(self, root: str | Path = ".") -> None:
        self.root = Path(root)

    @abstractmethod
    def read(self, cursor: Cursor | None = None) -> Iterator[tuple[str | None, Cursor]]:
        """Yield each document after `cursor` with the cursor that follows it.

        A row whose text is missing, null for one, is yielded as None, so that it is counted.

        Raises:
            UserError: the text cannot be had; the line names the file and the place in it.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hex sha256 that changes when the documents do.

        It decides whether a prepared source is reused, so it must be cheap: files, for
        one, are told apart by name, size and time of change. The hash of the text itself
        is found while reading it and stands in the manifest.
        """

    @abstractmethod
    def describe(self) -> str:
        """Say in one line what is read."""

    def local_files(self) -> list[Path]:
        """Return the files of this machine that the documents come from, if any do."""
        return []

    def documents(self) -> Iterator[str]:
        """Yield every document that is not empty or white space."""
        return (text for text, _ in self.read() if text is not None and not is_blank(text))

    def part(self, index: int, count: int) -> Iterator[str | None]:
        """Yield the documents of one of `count` parts, whose order is that of the source.

        A source that has no cheap division is whole in part 0, and the others are empty.
        """
        return (text for text, _ in self.read()) if index == 0 else iter(())

    def chunks(self) -> Iterator[str]:
        """Yield the text of a source that is one document, in pieces that join to it."""
        yield next(self.documents())

    def notes(self) -> list[str]:
        """Say, a line each, what a reader of the results must know, such as what is missing."""
        return []

    @property
    def single_document(self) -> bool:
        """Whether the source is one document, which is split contiguously."""
        texts = self.documents()
        return next(texts, None) is not None and next(texts, None) is None


def is_blank(text: str) -> bool:
    """Whether a text holds nothing to learn from."""
    return not text or text.isspace()


def hash_json(value: Any) -> str:
    """Return the hex sha256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
