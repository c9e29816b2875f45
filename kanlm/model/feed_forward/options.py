"""Options of classes in a registry, read off their signatures."""

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any


def complete(setting: str, registry: Mapping[str, type], spec: Mapping[str, Any]) -> dict[str, Any]:
    """Lay the options of `spec` over the defaults of the class in `registry` it names."""
    kind = spec.get("kind")
    if not isinstance(kind, str) or kind not in registry:
        raise ValueError(f"{setting}.kind = {kind!r} is unknown{_nearest(str(kind), registry)}")
    defaults = {
        name: list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
        for name, parameter in inspect.signature(registry[kind]).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    for name in spec:
        if name not in (known := ["kind", "hidden", *defaults]):
            raise ValueError(
                f"{setting}.{name} is no option of kind {kind!r}{_nearest(name, known)}"
            )
    return {**defaults, **spec}


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; expected one of: {', '.join(known)}"
