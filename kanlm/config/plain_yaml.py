"""YAML that is small, shallow and plain, before anything is made of it.

The file may be somebody else's. Aliases let a page of text stand for more values than fit
into memory, brackets in brackets exhaust the stack, and `${…}` would be replaced by what
stands elsewhere, in the environment for one.
"""

import re

import yaml

#: Characters of a file, values in it with aliases written out, and levels of nesting.
LARGEST_FILE, MOST_VALUES, DEEPEST = 2**20, 50_000, 50
_PLAIN = re.compile(r"tag:yaml\.org,2002:(null|bool|int|float|str|seq|map|merge)")


def check_yaml(text: str) -> None:
    """Check one document.

    Raises:
        ValueError: it is too large or too deep, or holds something that no setting is.
        yaml.YAMLError: it is no YAML.
    """
    if len(text) > LARGEST_FILE:
        raise ValueError(f"{len(text)} characters, expected at most {LARGEST_FILE}")
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"more than {DEEPEST} levels of nesting")
    root = yaml.compose(text, Loader=yaml.SafeLoader)
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
