"""`kanlm settings`: every setting with its type, default and meaning, as Markdown.

configs/settings.md is this text; a test keeps it so.
"""

import dataclasses
import json
import textwrap
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kanlm.config import Config
from kanlm.config.documentation import (
    REQUIRED,
    Setting,
    fields_of,
    options_of,
    section_of,
    summary,
)
from kanlm.data.sources import SOURCES
from kanlm.errors import UserError, nearest
from kanlm.kan import BASES, KANLinear
from kanlm.kan.shared import SharedFunctions
from kanlm.model.feed_forward import FEED_FORWARDS
from kanlm.training.strategies import STRATEGIES

_INTRODUCTION = """\
# Settings

Every setting of a config, written by `kanlm settings > configs/settings.md`. `kanlm settings NAME`
prints one section, kind, basis, source or strategy; `kanlm VERB CONFIG --print-config` shows every
setting as it will run. On the command line a setting is `section.key=value`, its value in YAML."""

#: Heading, where in a config one of the names stands, and what is registered.
_REGISTRIES: list[tuple[str, str, Mapping[str, type]]] = [
    ("Feed-forward kinds", "model.feed_forward.kind", FEED_FORWARDS),
    ("Bases", "model.feed_forward.basis.kind", BASES),
    ("Sources of text", "data.sources.0.kind", SOURCES),
    ("Strategies against forgetting", "strategy.kind", STRATEGIES),
]


@dataclass(frozen=True)
class Section:
    """One part of the page.

    Attributes:
        name: by which it is asked for, such as `training` or `kan-local`.
        title: its heading, with the marks of Markdown.
        meaning: what it is, in a paragraph.
        settings: dotted name → the setting.
    """

    name: str
    title: str
    meaning: str
    settings: dict[str, Setting]

    @property
    def text(self) -> str:
        """The section as Markdown."""
        lines = [_entry(name, setting) for name, setting in self.settings.items()]
        parts = [self.title, textwrap.fill(self.meaning, 100), "\n".join(lines) or "No options."]
        return "\n\n".join(parts)


def settings_text(name: str | None = None) -> str:
    """Describe every setting, or those that go by a name.

    Args:
        name: a section, feed-forward kind, basis, source or strategy, such as `training` or
            `bspline`, or a setting, such as `training.steps` or, wherever it stands, `steps`.

    Raises:
        UserError: there is nothing of this name.
    """
    sections = list(_sections())
    if name is None:
        return "\n\n".join([_INTRODUCTION, *(section.text for section in sections)]) + "\n"
    found = [section.text for section in sections if section.name == name]
    found = found or [
        f"{section.title}\n\n{_entry(dotted, setting)}"
        for section in sections
        for dotted, setting in section.settings.items()
        if name in (dotted, setting.name)
    ]
    if found:
        return "\n\n".join(found) + "\n"
    names = [section.name for section in sections]
    dotted = [name for section in sections for name in section.settings]
    close = nearest(name, [*names, *dotted])
    advice = close if "did you mean" in close else nearest(name, names)
    raise UserError(f"there is no setting or section '{name}'{advice}")


def _sections() -> Iterator[Section]:
    """Return the parts of the page, in its order."""
    yield Section("top", "## Top level", summary(Config), _by_name(fields_of(Config)))
    hints = typing.get_type_hints(Config, include_extras=True)
    for field in dataclasses.fields(Config):
        schema = section_of(hints[field.name])
        if schema is not None:
            settings = _by_name(fields_of(schema), f"{field.name}.")
            yield Section(field.name, f"## `{field.name}`", summary(schema), settings)
    classes = [cls for _, _, registry in _REGISTRIES for cls in registry.values()]
    for heading, place, registry in _REGISTRIES:
        for i, (name, cls) in enumerate(registry.items()):
            title = f"### `{name}`"
            if i == 0:
                title = f"## {heading}\n\n`{place}` takes one of these names.\n\n{title}"
            options = _by_name(options_of(cls, [*classes, KANLinear, SharedFunctions]))
            yield Section(name, title, summary(cls), options)


def _by_name(settings: Iterable[Setting], prefix: str = "") -> dict[str, Setting]:
    return {f"{prefix}{setting.name}": setting for setting in settings}


def _entry(name: str, setting: Setting) -> str:
    default = "required" if setting.default is REQUIRED else f"default {_yaml(setting.default)}"
    meaning = f": {setting.meaning}" if setting.meaning else ""
    entry = f"- `{name}` ({setting.type}; {default}){meaning}"
    return textwrap.fill(entry, 100, subsequent_indent="  ", break_on_hyphens=False)


def _yaml(value: Any) -> str:
    """Write a default on one line, as a config would state it."""
    return f"`{json.dumps(value)}`"
