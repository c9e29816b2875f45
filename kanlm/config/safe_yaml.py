"""YAML that is small, shallow and plain, read and written by the core schema of YAML 1.2.

By that 010 is ten and 0o10 eight, and `on`, `yes`, 1_000 and 1:30 are words, which a setting of
another type refuses; PyYAML alone takes them for 8, true, true, 1000 and 90 without a warning.

A file may come from anybody. Its tags could run code, its aliases let a page of text stand for
more values than fit into memory, and brackets in brackets exhaust the stack: all are refused.
"""

import re
from typing import Any

import yaml

#: Characters of a file, values in it with aliases written out, and levels of nesting.
LARGEST_FILE, MOST_VALUES, DEEPEST = 2**20, 50_000, 50

_TAG = "tag:yaml.org,2002:"
_TEXT, _MERGE = f"{_TAG}str", f"{_TAG}merge"
#: Types of a setting → plain scalars that are read as one, and the characters they begin with.
_PLAIN = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "merge": (r"<<", "<"),
}
_TYPES = {_TAG + name for name in (*_PLAIN, "str", "seq", "map")}


class _Loader(yaml.SafeLoader):
    """Makes values by the core schema, and refuses what no setting is while it reads."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0
        #: Node → values that it stands for and levels below it, by identity.
        self.sizes: dict[int, tuple[int, int]] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        if self.depth > DEEPEST:
            raise ValueError(f"more than {DEEPEST} levels of nesting")
        alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if node is None:
            return None
        line = node.start_mark.line + 1
        if not alias:
            self.sizes[id(node)] = self._measured(node, line)
        elif id(node) not in self.sizes:
            raise ValueError(f"an alias of itself in line {line}")
        if self.depth + self.sizes[id(node)][1] > DEEPEST:
            raise ValueError(f"more than {DEEPEST} levels of nesting")
        return node

    def _measured(self, node: yaml.Node, line: int) -> tuple[int, int]:
        if node.tag not in _TYPES:
            raise ValueError(f"{node.tag} in line {line} is no value for a setting")
        if isinstance(node, yaml.ScalarNode):
            if "${" in node.value and node.style is None:
                raise ValueError(
                    f"'${{' in line {line} is not replaced by anything; quote text that holds it"
                )
            return 1, 0
        parts = node.value
        if isinstance(node, yaml.MappingNode):
            keys = [k for k, _ in parts if isinstance(k, yaml.ScalarNode) and k.tag != _MERGE]
            first = {key.value: key for key in reversed(keys)}
            for key in keys:
                if first[key.value] is not key:
                    line = key.start_mark.line + 1
                    raise ValueError(f"found duplicate key {key.value} in line {line}")
            parts = [part for pair in parts for part in pair]
        found = [self.sizes[id(part)] for part in parts]
        total = 1 + sum(size for size, _ in found)
        if total > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES} values")
        return total, 1 + max((levels for _, levels in found), default=0)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return int(node.value, {"0o": 8, "0x": 16}.get(node.value[:2], 10))


_Loader.add_constructor(f"{_TAG}int", _Loader.construct_yaml_int)
for _name, (_pattern, _first) in _PLAIN.items():
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), list(_first))


class _Dumper(yaml.SafeDumper):
    """Quotes what readers of YAML 1.1 or of 1.2 would not take for text, and escapes line breaks.

    Within '…' a break is folded, and U+0085, U+2028 and U+2029 are breaks to some readers only.
    """

    def represent_text(self, text: str) -> yaml.ScalarNode:
        plain = _RESOLVER.resolve(yaml.ScalarNode, text, (True, False)) == _TEXT
        breaks = set(text) & set("\r\n\x85\u2028\u2029\ufeff")
        style = None if plain and "${" not in text else "'"
        return self.represent_scalar(_TEXT, text, style='"' if breaks else style)


_Dumper.add_representer(str, _Dumper.represent_text)
_RESOLVER = _Loader("")


def read_yaml(text: str) -> Any:
    """Read the value of one document.

    Raises:
        ValueError: it is too large or too deep, or holds something that no setting is.
        yaml.YAMLError: it is not YAML.
    """
    if len(text) > LARGEST_FILE:
        raise ValueError(f"{len(text)} characters, expected at most {LARGEST_FILE}")
    return yaml.load(text, Loader=_Loader)


def write_yaml(value: Any) -> str:
    """Write a value of plain types so that readers of YAML 1.1 and 1.2 read the same."""
    return yaml.dump(
        value, Dumper=_Dumper, default_flow_style=False, sort_keys=False, allow_unicode=True
    )
