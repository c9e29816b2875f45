"""Checking settings against a schema, and saying what is wrong in one line."""

import dataclasses
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import field
from functools import cache
from typing import Any

from kanlm.errors import UserError, nearest

#: Characters of a wrong value that are shown.
LONGEST_VALUE = 200

#: Why some values that are to be expected are refused.
REASONS = {
    'training.precision = "fp16"': "float16 has gradients vanish unless losses are scaled, and a "
    "scale that moves with what overflowed would make numbers depend on it; bf16 is as fast",
}


def check(schema: Any, tree: Mapping[str, Any], setting: str, beside: Sequence[str] = ()) -> Any:
    """Check a nested dictionary against a dataclass or typed dictionary, and make one of it.

    Types are checked strictly. Dataclasses, those within them included, refuse unknown names;
    typed dictionaries pass over them.

    Args:
        setting: where the tree stands, for errors.
        beside: names to suggest that are not the dataclass's own.

    Raises:
        UserError: naming the first setting that is unknown, of a wrong type, or impossible.
    """
    from pydantic import ValidationError

    try:
        return parse_json(schema, json.dumps(tree))
    except ValidationError as error:
        problems = error.errors(include_url=False)
        # A misspelt name is often the cause of a missing one.
        unknown = (p for p in problems if p["type"] == "unexpected_keyword_argument")
        problem = next(unknown, problems[0])
        raise UserError(_explain(problem, tree, schema, setting, beside)) from None
    except (TypeError, RecursionError) as error:
        raise UserError(f"{setting or 'config'}: {error}") from None


def parse_json(schema: Any, text: str | bytes) -> Any:
    """Make what `check` makes of a dictionary's JSON.

    Raises:
        ValueError: it is not JSON, or does not fit the schema.
    """
    # JSON mode is strict about types and still reads a list as a tuple.
    return _adapter(schema).validate_json(text, strict=True)


@cache
def _adapter(schema: Any) -> Any:
    from pydantic import TypeAdapter, with_config

    if (
        isinstance(schema, type)
        and dataclasses.is_dataclass(schema)
        and "__pydantic_config__" not in vars(schema)
    ):
        # The dataclasses within inherit it.
        with_config(extra="forbid")(schema)
    return TypeAdapter(schema)


def check_options(
    factory: Any, options: Mapping[str, Any], setting: str, beside: Sequence[str] = ()
) -> dict[str, Any]:
    """Check options against the keyword-only arguments of a class, filling in defaults.

    This is how a feed-forward kind, basis, source or strategy brings its own typed options: they
    are whatever its constructor takes after `*`. Names in `beside` may stand in the same section,
    but are not the class's own: they are only suggested.

    Raises:
        UserError: an option is unknown, missing or of a wrong type; `setting` names where.
    """
    checked = check(_options_schema(factory), options, setting, beside)
    return json.loads(json.dumps(dataclasses.asdict(checked)))


@cache
def _options_schema(factory: Any) -> type:
    fields = []
    for parameter in inspect.signature(factory, eval_str=True).parameters.values():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        kind = Any if parameter.annotation is inspect.Parameter.empty else parameter.annotation
        default = parameter.default
        required = default is inspect.Parameter.empty
        filled = () if required else (field(default_factory=lambda value=default: value),)
        fields.append((parameter.name, kind, *filled))
    schema = dataclasses.make_dataclass("Options", fields, kw_only=True)
    schema.__pydantic_config__ = {
        "extra": "forbid",
        "arbitrary_types_allowed": True,
        "allow_inf_nan": False,
    }
    return schema


def _explain(problem: Any, tree: Any, schema: Any, setting: str, beside: Sequence[str]) -> str:
    """Put pydantic's first problem into one line: setting, value, what was expected."""
    missing = problem["type"].startswith("missing")
    location = _location(problem["loc"], tree, missing)
    path = ".".join([setting, *location] if setting else location)
    if not path.isprintable():
        # A key in somebody's file may hold the end of a line.
        path = repr(path)[1:-1]
    if problem["type"] == "unexpected_keyword_argument":
        known = [*_known_keys(schema, location), *beside]
        return f"unknown setting '{path}'{nearest(location[-1], known)}"
    if missing:
        return f"setting '{path}' is missing"
    if problem["type"] == "value_error":
        return f"{path}: {problem['ctx']['error']}" if path else str(problem["ctx"]["error"])
    value = json.dumps(problem["input"])
    if len(value) > LONGEST_VALUE:
        value = f"{value[:LONGEST_VALUE]}…"
    reason = REASONS.get(f"{path} = {value}")
    expected = f"{problem['msg'][0].lower()}{problem['msg'][1:]}"
    return f"{path} = {value}: {expected}{f'; {reason}' if reason else ''}"


def _location(parts: Sequence[str | int], tree: Any, missing: bool) -> list[str]:
    """Return the parts of pydantic's location that are in the tree; it adds names of types."""
    location = []
    for part in parts:
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            if not (missing and part == parts[-1]):
                continue
        location.append(str(part))
    return location


def _known_keys(schema: Any, location: list[str]) -> list[str]:
    """Names of the fields at the place in the schema where `location` goes wrong."""
    for part in location[:-1]:
        if not dataclasses.is_dataclass(schema):
            return []
        kinds = [f.type for f in dataclasses.fields(schema) if f.name == part]
        for kind in kinds:
            candidates = [kind, *getattr(kind, "__args__", ())]
            schema = next((c for c in candidates if dataclasses.is_dataclass(c)), schema)
    return [f.name for f in dataclasses.fields(schema)] if dataclasses.is_dataclass(schema) else []
