"""What the code says of its settings: name, type, default and meaning, read off the code itself.

The fields of the schema are described by the `#:` comments above them; the options of a
feed-forward kind, a basis, a source or a strategy by the `Args:` section of its class. So that
there is one place for each, this is where `kanlm settings` and configs/settings.md have them from.
"""

import ast
import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from annotated_types import Ge, Gt, Le, Lt

#: Stands for a default where there is none.
REQUIRED = object()

_SECTION = re.compile(r"^(Args|Arguments|Raises|Returns|Attributes|Yields):(.*)$")
_REFERENCE = re.compile(r"(?:\bas of|^see) `(\w+)`")


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: of the field or argument.
        type: in words, such as `int or null`; for a choice its values.
        default: as YAML would have it, or `REQUIRED`.
        meaning: plain text, one paragraph; empty if the code says nothing.
    """

    name: str
    type: str
    default: Any
    meaning: str


def fields_of(schema: type) -> list[Setting]:
    """List the settings of a dataclass, but for those that are sections themselves."""
    comments = _comments(schema)
    hints = typing.get_type_hints(schema, include_extras=True)
    found = []
    for field in dataclasses.fields(schema):
        if section_of(hints[field.name]) is not None:
            continue
        if field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        else:
            default = REQUIRED
        meaning = comments.get(field.name, "")
        found.append(Setting(field.name, describe_type(hints[field.name]), default, meaning))
    return found


def section_of(hint: Any) -> type | None:
    """Find the dataclass that a field of this type holds, alone or beside null; None if none."""
    kinds = typing.get_args(hint) if _is_union(hint) else (hint,)
    return next((k for k in kinds if isinstance(k, type) and dataclasses.is_dataclass(k)), None)


def options_of(factory: type, others: Iterable[type] = ()) -> list[Setting]:
    """List the settings of a class in a registry: its keyword-only arguments.

    Args:
        factory: the class.
        others: classes whose docstrings its own may refer to by name.
    """
    known = {cls.__name__: cls for cls in (*others, *reversed(factory.__mro__))}
    found = []
    for parameter in inspect.signature(factory, eval_str=True).parameters.values():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        empty = parameter.default is inspect.Parameter.empty
        found.append(
            Setting(
                parameter.name,
                describe_type(parameter.annotation),
                REQUIRED if empty else parameter.default,
                _meaning(factory, parameter.name, known, ()),
            )
        )
    return found


def summary(cls: type) -> str:
    """Return the first paragraph of a class's docstring, on one line."""
    return " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())


def describe_type(hint: Any) -> str:
    """Describe a type in the words of somebody who writes YAML."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return " ".join([describe_type(arguments[0]), _limits(arguments[1:])])
    if hint is type(None):
        return "null"
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if _is_union(hint):
        return " or ".join(dict.fromkeys(describe_type(argument) for argument in arguments))
    if origin is list or (origin is tuple and arguments[-1] is ...):
        return (
            "list of mapping"
            if section_of(arguments[0])
            else f"list of {describe_type(arguments[0])}"
        )
    if origin is tuple:
        return f"[{', '.join(describe_type(argument) for argument in arguments)}]"
    if origin in (dict, Mapping) or hint is dict:
        return "mapping"
    names = {int: "whole number", float: "number", str: "text", bool: "`true` or `false`"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _limits(constraints: Iterable[Any]) -> str:
    """Describe the range of a number: `≥ 0, < 1`."""
    signs = {Gt: ">", Ge: "≥", Lt: "<", Le: "≤"}
    return ", ".join(
        f"{sign} {getattr(each, kind.__name__.lower())}"
        for each in constraints
        for kind, sign in signs.items()
        if isinstance(each, kind)
    )


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _comments(schema: type) -> dict[str, str]:
    """Map each field to the `#:` comment that stands directly above it."""
    source = textwrap.dedent(inspect.getsource(schema))
    lines = source.splitlines()
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.ClassDef)
    found = {}
    for statement in node.body:
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        above: list[str] = []
        number = statement.lineno - 2
        while number >= 0 and (line := lines[number].strip()).startswith("#:"):
            above.insert(0, line.removeprefix("#:").strip())
            number -= 1
        if above:
            found[statement.target.id] = " ".join(above)
    return found


def _meaning(cls: type, name: str, known: Mapping[str, type], seen: tuple[type, ...]) -> str:
    """Find what a class's docstring, or the one that it refers to, says of an argument."""
    if cls in seen:
        return ""
    arguments, reference = _arguments(cls)
    text = arguments.get(name, "")
    found = _REFERENCE.search(text)
    if not found and text:
        return text
    other = found[1] if found else reference
    if other is None or other not in known:
        return text
    meaning = _meaning(known[other], name, known, (*seen, cls))
    rest = "" if not found else text[found.end() :].strip(" ;,.")
    return f"{meaning} {rest[0].upper()}{rest[1:]}." if meaning and rest else meaning or text


def _arguments(cls: type) -> tuple[dict[str, str], str | None]:
    """Map arguments to their text in `Args:`, and find the class that it refers to for others."""
    found: dict[str, str] = {}
    reference, inside, names = None, False, []
    for line in (inspect.getdoc(cls) or "").splitlines():
        heading = _SECTION.match(line)
        if heading:
            inside = heading[1] == "Args"
            named = _REFERENCE.search(heading[2]) if inside else None
            reference = named[1] if named else reference
            names = []
        elif inside and (entry := re.match(r"^ {4}(\w+(?:, \w+)*): (.*)$", line)):
            names = entry[1].split(", ")
            found.update(dict.fromkeys(names, entry[2]))
        elif inside and line.startswith("     "):
            found.update({name: f"{found[name]} {line.strip()}" for name in names})
    return found, reference
