"""Options of classes in a registry, read off their signatures."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

#: Options of feed-forward kinds that hold blocks within the block: one spec, or a list of
#: them. Their width is the outer block's, so that they state none.
NESTED = ("experts", "block")


def complete(
    setting: str, registry: Mapping[str, type], spec: Mapping[str, Any], beside: Sequence[str] = ()
) -> dict[str, Any]:
    """Lay the options of `spec` over the defaults of the class in `registry` it names.

    Arguments:
        setting: where the spec stands, for errors.
        beside: names that may stand in the spec and are not the class's own.

    Raises:
        ValueError: the kind or an option is unknown.
    """
    kind = spec.get("kind") if isinstance(spec, Mapping) else spec
    if not isinstance(spec, Mapping) or not isinstance(kind, str) or kind not in registry:
        raise ValueError(f"{setting}.kind = {kind!r} is unknown{_nearest(str(kind), registry)}")
    defaults = {
        name: list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
        for name, parameter in inspect.signature(registry[kind]).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    for name in spec:
        if name not in (known := ["kind", *beside, *defaults]):
            raise ValueError(
                f"{setting}.{name} is no option of kind {kind!r}{_nearest(name, known)}"
            )
    return {**defaults, **spec}


def over_default_basis(factory: type, spec: Mapping[str, Any]) -> Mapping[str, Any]:
    """Lay a basis's spec over the one that a feed-forward kind takes by default.

    As everywhere in settings, the same kind, or none, merges, and another kind replaces.
    """
    default = inspect.signature(factory).parameters["basis"].default
    if not isinstance(spec, Mapping) or not isinstance(default, Mapping):
        return spec
    same = spec.get("kind", default["kind"]) == default["kind"]
    return {**default, **spec} if same else spec


def map_nested(
    options: Mapping[str, Any],
    setting: str,
    change: Callable[[Any, str], dict[str, Any]],
) -> dict[str, Any]:
    """Replace every spec of a block within the block by `change(spec, its setting)`."""
    changed = dict(options)
    for name in NESTED:
        inner = options.get(name)
        if isinstance(inner, list):
            changed[name] = [change(each, f"{setting}.{name}.{i}") for i, each in enumerate(inner)]
        elif inner is not None:
            changed[name] = change(inner, f"{setting}.{name}")
    return changed


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; expected one of: {', '.join(known)}"
