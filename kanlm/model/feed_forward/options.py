"""Options of classes in a registry, read off their signatures."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

#: Options of feed-forward kinds that hold blocks within the block: one spec, or a list of
#: them. Their width is the outer block's, so that they state none.
NESTED = ("experts", "block")

#: Checks a spec as strictly as its source asks for before it is completed. It is called with the
#: registry, the spec, where that stands, and names that may stand in it beside the class's own,
#: and returns the spec with values of the annotated types.
Check = Callable[[Mapping[str, type], Any, str, Sequence[str]], Mapping[str, Any]]


def complete(
    setting: str,
    registry: Mapping[str, type],
    spec: Mapping[str, Any],
    beside: Sequence[str] = (),
    check: Check | None = None,
) -> dict[str, Any]:
    """Lay the options of `spec` over the defaults of the class in `registry` it names.

    Args:
        setting: where the spec stands, for errors.
        beside: names that may stand in the spec and are not the class's own.
        check: what to check before; null trusts the types of values.

    Raises:
        ValueError: the kind or an option is unknown.
    """
    if check is not None:
        spec = check(registry, spec, setting, beside)
    kind = spec.get("kind") if isinstance(spec, Mapping) else spec
    if not isinstance(spec, Mapping) or not isinstance(kind, str) or kind not in registry:
        raise ValueError(f"{setting}.kind = {kind!r} is unknown; {_one_of(registry)}")
    defaults = {
        name: list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
        for name, parameter in inspect.signature(registry[kind]).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    for name in spec:
        if name not in (known := ["kind", *beside, *defaults]):
            raise ValueError(
                f"{setting}.{name} is not an option of kind {kind!r}; {_one_of(known)}"
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


def _one_of(names: Iterable[str]) -> str:
    return f"expected one of: {', '.join(names)}"
