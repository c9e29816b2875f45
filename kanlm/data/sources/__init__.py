"""Where documents come from: one class per kind, its options its keyword-only arguments.

To add a kind, write a `Source` class in a module beside this one and a line in `SOURCES`.
"""

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kanlm.config import DataSettings, check_options, parse_override
from kanlm.data.sources.base import Cursor, Source
from kanlm.data.sources.files import Files, find_files
from kanlm.data.sources.hub import Hub
from kanlm.data.sources.stdlib import StdlibCode, StdlibProse
from kanlm.errors import UserError, nearest

__all__ = [
    "SOURCES",
    "Cursor",
    "Source",
    "check_source",
    "make_source",
    "open_sources",
    "parse_source_argument",
]

SOURCES: dict[str, type[Source]] = {
    "stdlib-prose": StdlibProse,
    "stdlib-code": StdlibCode,
    "files": Files,
    "hub": Hub,
}


def make_source(spec: Mapping[str, Any], root: str | Path = ".") -> Source:
    """Build the source that one entry of `data.sources` describes.

    Args:
        spec: `{kind, …options}`; a `weight`, which belongs to the mixture, is ignored.
        root: folder against which the source's relative paths are read.

    Raises:
        UserError: as `check_source`, or what it names cannot be found.
    """
    options = check_source(spec, root)
    del options["weight"]
    return SOURCES[options.pop("kind")](root, **options)


def open_sources(data: DataSettings) -> list[Source]:
    """Return the sources of a domain.

    Raises:
        UserError: none is named, one cannot be found, or two read the same text.
    """
    if not data.sources:
        raise UserError(
            "data.sources is missing: name the text, for example data.sources=stdlib-prose, "
            "data.sources='[{kind: files, path: books/*.txt}]' or "
            "data.sources='[{kind: hub, name: NAME}]'"
        )
    sources = [make_source(spec, data.root) for spec in data.sources]
    _check_apart(sources)
    return sources


def _check_apart(sources: Sequence[Source]) -> None:
    """Check that no source gives the text of another again, which would count twice.

    Cut in another way, one's training text would be the other's held-out text besides.

    Raises:
        UserError: two read the same column of a file.
    """
    readers: dict[tuple[Path, str], int] = {}
    for number, source in enumerate(sources):
        for path in source.local_files():
            other = readers.setdefault((path.resolve(), getattr(source, "column", "")), number)
            if other != number:
                raise UserError(
                    f"data.sources {other} and {number} both read {path}; name it in one of them, "
                    "with a larger weight where it is to count more"
                )


def check_source(
    spec: Mapping[str, Any], root: str | Path = ".", setting: str = "data.sources"
) -> dict[str, Any]:
    """Return the spec with every default filled in.

    Raises:
        UserError: the kind or an option is unknown, or an option has a wrong type.
    """
    options = {key: value for key, value in spec.items() if key not in ("kind", "weight")}
    kind = spec.get("kind")
    if kind is None:
        raise UserError(f"{setting}: a source has no kind; expected one of: {', '.join(SOURCES)}")
    if kind not in SOURCES:
        if find_files(str(kind), Path(root)):
            advice = f"is a path, no kind; write {{kind: files, path: {kind}}}"
            raise UserError(f"{setting}: '{kind}' {advice}")
        raise UserError(f"{setting}: unknown kind '{kind}'{nearest(str(kind), SOURCES)}")
    weight = spec.get("weight", 1.0)
    checked = check_options(SOURCES[kind], options, f"{setting}.{kind}", beside=("kind", "weight"))
    return {"kind": kind, "weight": weight, **checked}


def parse_source_argument(text: str) -> dict[str, Any]:
    """Turn a SOURCE of the command line into the spec that `make_source` takes.

    It is `stdlib-prose` or `stdlib-code`, `hub:NAME`, a path or glob, or, in YAML, what a config
    has there: a list of paths, `[a.jsonl, b/*.txt]`, or an entry of `data.sources`,
    `{kind: files, path: a.csv, column: body}`. A file of such a name comes first. Paths are read
    from the current folder, and absolute in the spec.

    Raises:
        UserError: it is something else, or a path does not exist.
    """
    if text in ("stdlib-prose", "stdlib-code"):
        return {"kind": text}
    if text.startswith("hub:"):
        if text == "hub:":
            raise UserError("source 'hub:': expected hub:NAME")
        return _from_here({"kind": "hub", "name": text.removeprefix("hub:")})
    if text and find_files(text, Path()):
        return _from_here({"kind": "files", "path": text})
    if text.startswith(("[", "{")):
        return _from_here(_written_out(text))
    if text and Path(text).expanduser().is_dir():
        raise UserError(f"source '{text}': a folder; write '{text.rstrip('/')}/**/*'")
    names = ["stdlib-prose", "stdlib-code", "hub:NAME", "a path or glob"]
    raise UserError(f"source '{text}': no such file, and no kind{nearest(text, names)}")


def _written_out(text: str) -> dict[str, Any]:
    """Read a list of paths or an entry of `data.sources`."""
    spec = parse_override(f"source={text}")["source"]
    if isinstance(spec, list):
        spec = {"kind": "files", "path": spec}
    if not isinstance(spec, dict):
        raise UserError(f"source '{text}': no such file, and no list of paths")
    check_source(spec, setting="source")
    return spec


def _from_here(spec: dict[str, Any]) -> dict[str, Any]:
    """Make the paths of a spec absolute, which are read from the current folder."""
    if spec["kind"] == "hub" and Path(spec["name"]).is_dir():
        spec["name"] = str(Path(spec["name"]).absolute())
    for option in ("path", "data_files"):
        if option in spec:
            given = spec[option]
            patterns = [given] if isinstance(given, str) else given
            absolute = [_absolute(pattern) for pattern in patterns]
            spec[option] = absolute[0] if isinstance(given, str) else absolute
    if spec["kind"] == "files":
        make_source(spec)
    return spec


def _absolute(pattern: str) -> str:
    path = Path(pattern).expanduser()
    if path.is_absolute() or path.exists():
        return str(path.absolute())
    return str(Path(glob.escape(str(Path.cwd()))) / path)
