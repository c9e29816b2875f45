"""Laying one nested dictionary of settings over another.

Wherever a section has a `kind` (tokenizer, schedule, feed-forward block, basis, source) a
bare word stands for `{kind: word}`, and naming another kind replaces the section instead
of merging into it. The optimizer's kinds share their settings, and so are merged.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kanlm.errors import UserError, first_line

#: Sections for which a bare word stands for `{kind: word}`.
KIND_SECTIONS = (
    "tokenizer",
    "schedule",
    "feed_forward",
    "experts",
    "block",
    "basis",
    "sources",
    "optimizer",
)
#: Those among them that are lists.
KIND_LISTS = ("experts", "sources")
#: Those whose settings hold for every kind, and outlive a change of it.
MERGED_SECTIONS = ("optimizer",)


def nested(name: str, value: Any) -> dict[str, Any]:
    """Turn a dotted name and its value into a nested dictionary."""
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted name and value of every setting in a nested dictionary."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def lies_in(name: str, sections: Sequence[str]) -> bool:
    """Whether a dotted name is one of `sections`, which may be settings, or below one."""
    return any(name == section or name.startswith(f"{section}.") for section in sections)


def merge(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Lay `upper` over `lower`. Lists, and sections that change their kind, are replaced.

    Raises:
        UserError: a key or value is of a kind that no setting has.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    below: dict[str, Any] = expand_kinds(dict(lower))
    above: dict[str, Any] = expand_kinds(dict(upper))
    _forget_other_kinds(below, above)
    try:
        merged = OmegaConf.to_container(OmegaConf.merge(OmegaConf.create(below), above))
    except (OmegaConfBaseException, ValueError, RecursionError) as error:
        raise UserError(f"settings cannot be merged: {first_line(error)}") from None
    assert isinstance(merged, dict)
    return {str(key): value for key, value in merged.items()}


def expand_kinds(tree: Any) -> Any:
    """Turn the bare words of KIND_SECTIONS into `{kind: word}`, all down."""
    if isinstance(tree, list):
        return [expand_kinds(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    expanded = {}
    for key, value in tree.items():
        if key in KIND_SECTIONS and isinstance(value, str):
            value = [{"kind": value}] if key in KIND_LISTS else {"kind": value}
        elif key in KIND_SECTIONS and isinstance(value, list):
            value = [{"kind": item} if isinstance(item, str) else item for item in value]
        expanded[key] = expand_kinds(value)
    return expanded


def _forget_other_kinds(lower: dict[str, Any], upper: Mapping[str, Any]) -> None:
    """Drop the sections of `lower` that `upper` gives another kind or another type."""
    for key, value in upper.items():
        below = lower.get(key)
        if not isinstance(value, dict) or not isinstance(below, dict):
            lower.pop(key, None)
        elif key in MERGED_SECTIONS or value.get("kind", below.get("kind")) == below.get("kind"):
            _forget_other_kinds(below, value)
        else:
            lower.pop(key)
