"""Laying one nested dictionary of settings over another.

Wherever a section has a `kind` (tokenizer, schedule, strategy, feed-forward block, basis, source)
a bare word stands for `{kind: word}`, and naming another kind replaces the section instead
of merging into it. The optimizer's kinds have the same settings, and so are merged.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

#: Sections for which a bare word stands for `{kind: word}`; those that are lists; and those
#: whose settings hold for every kind, and outlive a change of it.
KIND_SECTIONS = (
    "tokenizer",
    "schedule",
    "strategy",
    "feed_forward",
    "experts",
    "block",
    "basis",
    "sources",
)
KIND_LISTS = ("experts", "sources")
MERGED_SECTIONS = ("optimizer",)


def merge(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Lay `upper` over `lower`. Lists, and sections that change their kind, are replaced."""
    merged, over = expand_kinds(lower), expand_kinds(upper)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(value, dict) and isinstance(below, dict)
        if both and (
            key in MERGED_SECTIONS or value.get("kind", below.get("kind")) == below.get("kind")
        ):
            value = merge(below, value)
        merged[key] = value
    return merged


def expand_kinds(tree: Any) -> Any:
    """Copy a tree, with the bare words of sections that have a kind as `{kind: word}`."""
    if isinstance(tree, list):
        return [expand_kinds(item) for item in tree]
    if not isinstance(tree, Mapping):
        return tree
    expanded = {}
    for key, value in tree.items():
        if key in (*KIND_SECTIONS, *MERGED_SECTIONS):
            if isinstance(value, str):
                value = [{"kind": value}] if key in KIND_LISTS else {"kind": value}
            elif isinstance(value, list):
                value = [{"kind": item} if isinstance(item, str) else item for item in value]
        expanded[str(key)] = expand_kinds(value)
    return expanded


def nested(name: str, value: Any) -> dict[str, Any]:
    """Turn a dotted name and its value into a nested dictionary."""
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and value of every setting in a nested dictionary."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def lies_in(name: str, sections: Sequence[str]) -> bool:
    """Whether a dotted name is one of `sections`, which may be settings, or below one."""
    return any(name == section or name.startswith(f"{section}.") for section in sections)
