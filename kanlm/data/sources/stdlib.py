"""Prose and code that every Python carries, so that the default needs no download.

Modules are found as files and read with `ast`; none is imported, except the table of
pydoc's topics, which is nothing but text.
"""

import ast
import functools
import hashlib
import importlib
import inspect
import re
import sysconfig
import tokenize
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path

from kanlm.data.sources.base import Cursor, Source, hash_json
from kanlm.data.sources.stdlib_modules import MODULES
from kanlm.errors import UserError

#: A class with at least this many characters of docstrings is a document of its own.
LONG_CLASS = 1000
#: Raised when the way documents are made from modules changes.
RECIPE = 1

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class _Modules(Source):
    """What both standard-library sources share: the files, and skipping those not there."""

    def __init__(self, root: str | Path = ".") -> None:
        super().__init__(root)
        library = Path(sysconfig.get_path("stdlib"))
        found = {name: _module_file(library, name) for name in MODULES}
        self.files = {name: path for name, path in found.items() if path is not None}
        if not self.files:
            raise UserError(f"source {self.label}: no Python source files in {library}")

    def read(self, cursor: Cursor | None = None) -> Iterator[tuple[str, Cursor]]:
        start = cursor["documents"] if cursor else 0
        texts = _remembered(type(self))
        for number in range(start, len(texts)):
            yield texts[number], {"documents": number + 1}

    def fingerprint(self) -> str:
        contents = [hashlib.sha256(path.read_bytes()).hexdigest() for path in self._read_files()]
        return hash_json([self.label, RECIPE, list(self.files), contents])

    def notes(self) -> list[str]:
        missing = [name for name in MODULES if name not in self.files]
        if not missing:
            return []
        return [f"{len(missing)} modules are not in this Python: {', '.join(missing)}"]

    def _read_files(self) -> list[Path]:
        return list(self.files.values())

    @abstractmethod
    def _all_documents(self) -> Iterator[str]:
        """Yield all documents in their order, before a cursor skips any."""


class StdlibProse(_Modules):
    """Sections of pydoc's topics, and docstrings under the dotted names they belong to.

    A document is a section of a topic, or a module with its functions and short classes,
    or a long class. Topics contain one another, so they are cut at their titles and a
    section that comes twice is kept once.
    """

    label = "stdlib-prose"

    def describe(self) -> str:
        return f"pydoc topics and docstrings of {len(self.files)} standard-library modules"

    def _read_files(self) -> list[Path]:
        topics = Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
        return [*super()._read_files(), *([topics] if topics.exists() else [])]

    def notes(self) -> list[str]:
        missing = [] if _topics() else ["pydoc's topics are not in this Python"]
        return [*super().notes(), *missing]

    def _all_documents(self) -> Iterator[str]:
        yield from topic_sections(_topics())
        for name, path in self.files.items():
            yield from docstring_documents(name, _parse(path)[1])


class StdlibCode(_Modules):
    """The modules' code without its docstrings, which `stdlib-prose` holds; one a document."""

    label = "stdlib-code"

    def describe(self) -> str:
        return f"{len(self.files)} standard-library modules without their docstrings"

    def _all_documents(self) -> Iterator[str]:
        for path in self.files.values():
            yield remove_docstrings(*_parse(path))


@functools.cache
def _remembered(source_class: type[_Modules]) -> list[str]:
    """Read a few megabytes once: parsing is slow, and a vocabulary is learned from them too."""
    return list(source_class()._all_documents())


def topic_sections(topics: list[str]) -> Iterator[str]:
    """Cut texts before every underlined title, and yield each section once."""
    title = re.compile(r"^([^\n]+)\n(([*=\-~^\"'])\3{2,})\n", re.MULTILINE)
    seen = set()
    for topic in topics:
        matches = [match for match in title.finditer(topic) if len(match[1]) == len(match[2])]
        cuts = sorted({0, *(match.start() for match in matches)})
        for start, stop in zip(cuts, [*cuts[1:], len(topic)], strict=True):
            section = topic[start:stop].strip()
            # The same section is underlined otherwise where it is a chapter of its own.
            key = re.sub(r"\W+", " ", section)
            if section and key not in seen:
                seen.add(key)
                yield section + "\n"


def docstring_documents(name: str, tree: ast.Module) -> Iterator[str]:
    """Yield a module's docstrings, each under its dotted name, with long classes apart."""
    module_entries = _entries(name, tree, deep=False)
    long_classes = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            entries = _entries(f"{name}.{node.name}", node, deep=True)
            if sum(map(len, entries)) >= LONG_CLASS:
                long_classes.append(entries)
            else:
                module_entries += entries
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            module_entries += _entries(f"{name}.{node.name}", node, deep=False)
    for entries in (module_entries, *long_classes):
        if entries:
            yield "\n".join(entries)


def remove_docstrings(text: str, tree: ast.Module) -> str:
    """Return the text without its docstrings and otherwise untouched, comments included.

    Lines that held nothing else go with them. A body that was only a docstring gets
    `pass`, so that the result parses to the same tree less the docstrings.
    """
    lines = [line.encode() for line in text.split("\n")]
    found = [node for node in _documented(tree) if _docstring(node) is not None]
    # From the last to the first, so that positions before it stay right.
    for node in sorted(found, key=lambda node: node.body[0].lineno, reverse=True):
        _remove_first_statement(lines, node)
    return b"\n".join(lines).decode()


def _remove_first_statement(lines: list[bytes], node: Documented) -> None:
    """Take the first statement of a body out of `lines`, whose columns count bytes."""
    statement = node.body[0]
    first, last = statement.lineno - 1, (statement.end_lineno or statement.lineno) - 1
    before = lines[first][: statement.col_offset]
    after = lines[last][statement.end_col_offset :]
    if len(node.body) == 1 and not isinstance(node, ast.Module):
        lines[first : last + 1] = [before + b"pass" + after]
        return
    if after.lstrip().startswith(b";"):
        after = after.lstrip()[1:].lstrip()
    lines[first : last + 1] = [before + after.lstrip()] if (before + after).strip() else []


def _entries(name: str, node: Documented, deep: bool) -> list[str]:
    """List "name, docstring" of a node, and of all that is defined in it if `deep`."""
    docstring = _docstring(node)
    text = inspect.cleandoc(docstring) if docstring else ""
    entries = [f"{name}\n\n{text}\n"] if text else []
    for child in node.body if deep else []:
        if isinstance(child, Documented):
            entries += _entries(f"{name}.{child.name}", child, isinstance(child, ast.ClassDef))
    return entries


def _documented(node: ast.AST) -> Iterator[Documented]:
    """Yield a node and all in it that may have a docstring, which only statements hold."""
    if isinstance(node, Documented):
        yield node
    for name in ("body", "orelse", "finalbody", "handlers", "cases"):
        children = getattr(node, name, None)
        # The body of a lambda or of `a if b else c` is an expression, and no list.
        for child in children if isinstance(children, list) else []:
            yield from _documented(child)


def _docstring(node: Documented) -> str | None:
    return ast.get_docstring(node, clean=False)


def _module_file(library: Path, name: str) -> Path | None:
    """Return where a module's source lies, without importing its package."""
    stem = library.joinpath(*name.split("."))
    for path in (stem.with_name(stem.name + ".py"), stem / "__init__.py"):
        if path.is_file():
            return path
    return None


def _parse(path: Path) -> tuple[str, ast.Module]:
    with tokenize.open(path) as file:
        text = file.read()
    return text, ast.parse(text)


def _topics() -> list[str]:
    try:
        return list(importlib.import_module("pydoc_data.topics").topics.values())
    except ImportError:
        return []
