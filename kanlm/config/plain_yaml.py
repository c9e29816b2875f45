"""YAML that is small, shallow and plain, read and written by the core schema of YAML 1.2.

By that 010 is ten and 0o10 eight, and `on`, `yes`, 1_000 and 1:30 are words, which a setting of
another type refuses; PyYAML alone takes them for 8, true, true, 1000 and 90, in silence.

The file may be somebody else's. Aliases let a page of text stand for more values than fit
into memory, brackets in brackets exhaust the stack, and `${…}` would be replaced by what
stands elsewhere, in the environment for one.
"""

import re
from typing import Any

import yaml

#: Characters of a file, values in it with aliases written out, and levels of nesting.
LARGEST_FILE, MOST_VALUES, DEEPEST = 2**20, 50_000, 50
_PLAIN = re.compile(r"tag:yaml\.org,2002:(null|bool|int|float|str|seq|map|merge)")


class _Loader(yaml.SafeLoader):
    """Makes values by the core schema, and refuses a key that stands twice."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        digits = node.value
        return int(digits, {"0o": 8, "0x": 16}.get(digits[:2], 10))

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"found duplicate key {key.value}", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
for _name, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})\Z"), list(_first)
    )


class _Dumper(yaml.SafeDumper):
    """Quotes what readers of YAML 1.1 or of 1.2 would take for no text, and escapes line breaks.

    Within '…' a break is folded, and U+0085, U+2028 and U+2029 are breaks to some readers only.
    """

    def represent_text(self, text: str) -> yaml.ScalarNode:
        plain = _RESOLVER.resolve(yaml.ScalarNode, text, (True, False)) == _TEXT
        breaks = set(text) & set("\r\n\x85\u2028\u2029\ufeff")
        return self.represent_scalar(_TEXT, text, style='"' if breaks else None if plain else "'")


_Dumper.add_representer(str, _Dumper.represent_text)
_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
_RESOLVER = _Loader("")


def read_yaml(text: str) -> Any:
    """Return the value that a text is.

    Raises:
        yaml.YAMLError, ValueError: it is none.
    """
    return yaml.load(text, Loader=_Loader)


def write_yaml(value: Any) -> str:
    """Return the text of a value of plain types."""
    return yaml.dump(
        value, Dumper=_Dumper, default_flow_style=False, sort_keys=False, allow_unicode=True
    )


def check_yaml(text: str) -> None:
    """Check one document.

    Raises:
        ValueError: it is too large or too deep, or holds something that no setting is.
        yaml.YAMLError: it is no YAML.
    """
    if len(text) > LARGEST_FILE:
        raise ValueError(f"{len(text)} characters, expected at most {LARGEST_FILE}")
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"more than {DEEPEST} levels of nesting")
    root = yaml.compose(text, Loader=_Loader)
    if root is not None and _count(root, {}, 0) > MOST_VALUES:
        raise ValueError(f"more than {MOST_VALUES} values")


def _count(node: yaml.Node, known: dict[int, int | None], depth: int) -> int:
    """Values that a node stands for, each node looked at once."""
    size = known.get(id(node), 0)
    if size is None:
        raise ValueError(f"an alias of itself in line {node.start_mark.line + 1}")
    if size:
        return size
    if not _PLAIN.fullmatch(node.tag):
        raise ValueError(f"{node.tag} in line {node.start_mark.line + 1} is no value for a setting")
    if depth > DEEPEST:
        raise ValueError(f"more than {DEEPEST} levels of nesting")
    known[id(node)] = None
    if isinstance(node, yaml.ScalarNode):
        if "${" in node.value:
            raise ValueError(
                f"'${{' in line {node.start_mark.line + 1} is not replaced by anything"
            )
        parts: list[yaml.Node] = []
    elif isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    else:
        parts = node.value
    known[id(node)] = total = 1 + sum(_count(part, known, depth + 1) for part in parts)
    return total
