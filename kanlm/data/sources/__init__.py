"""Where documents come from: one class per kind, its options its keyword-only arguments.

To add a kind, write a `Source` class in a module beside this one and a line in `SOURCES`.
"""

import glob
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kanlm.config import check_options
from kanlm.data.sources.base import Cursor, Source
from kanlm.data.sources.files import Files
from kanlm.data.sources.hub import Hub
from kanlm.data.sources.stdlib import StdlibCode, StdlibProse
from kanlm.errors import UserError, nearest

__all__ = ["SOURCES", "Cursor", "Source", "check_source", "make_source", "parse_source_argument"]

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
        if _finds_file(str(kind), Path(root)):
            advice = f"is a path, no kind; write {{kind: files, path: {kind}}}"
            raise UserError(f"{setting}: '{kind}' {advice}")
        raise UserError(f"{setting}: unknown kind '{kind}'{nearest(str(kind), SOURCES)}")
    weight = spec.get("weight", 1.0)
    checked = check_options(SOURCES[kind], options, f"{setting}.{kind}", beside=("kind", "weight"))
    return {"kind": kind, "weight": weight, **checked}


def parse_source_argument(text: str) -> dict[str, Any]:
    """Turn a SOURCE of the command line into the spec that `make_source` takes.

    `stdlib-prose` and `stdlib-code` are kinds, `hub:NAME` a dataset, and anything else
    a path or glob, read from the current folder.

    Raises:
        UserError: it is none of these, or the path does not exist.
    """
    if text.startswith("hub:"):
        if text == "hub:":
            raise UserError("source 'hub:': expected hub:NAME")
        return {"kind": "hub", "name": text.removeprefix("hub:")}
    if text in ("stdlib-prose", "stdlib-code"):
        return {"kind": text}
    if not _finds_file(text, Path()):
        names = ["stdlib-prose", "stdlib-code", "hub:NAME", "a path or glob"]
        raise UserError(f"source '{text}': no such file, and no kind{nearest(text, names)}")
    return {"kind": "files", "path": str(Path(text).absolute())}


def _finds_file(pattern: str, root: Path) -> bool:
    return bool(pattern) and bool(glob.glob(str(root / pattern), recursive=True))
