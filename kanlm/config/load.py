"""How a configuration comes together, and how it is written.

1. A YAML file may name a `base:` file; it is laid over it, and so on down.
2. `section.key=value` overrides from the command line are laid on top.
3. The result is checked against the dataclasses of `schema`: an unknown key, a wrong type
   or an impossible combination is refused in one line that names the setting.
"""

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from yaml import YAMLError

from kanlm.config.checking import check
from kanlm.config.merging import expand_kinds, merge, nested
from kanlm.config.safe_yaml import read_yaml, write_yaml
from kanlm.config.schema import Config
from kanlm.errors import UserError, first_line


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file with its bases, lay dotted overrides on top, and check it all.

    Raises:
        UserError: a file is missing or not YAML, or a setting is unknown or impossible.
    """
    return from_tree(read_tree(path, overrides))


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read and merge as `load` does, without checking: a nested dictionary."""
    tree = read_file(Path(path))
    study = tree.get("study")
    command = study.get("launcher") if isinstance(study, dict) else None
    if command is not None:
        # A file may come from anybody, and must not be able to start a program.
        raise UserError(
            f"{path}: study.launcher is a command, and is taken from the command line alone: "
            f"give it as study.launcher={shlex.quote(str(command))}, and null here"
        )
    for override in overrides:
        tree = merge(tree, parse_override(override))
    return tree


def read_file(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a YAML file, laid over its bases.

    Args:
        seen: files that led here.

    Raises:
        UserError: a file is missing, is not YAML, or is its own base.
    """
    if path.resolve() in seen:
        raise UserError(f"{path}: `base:` leads back to the same file")
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except (YAMLError, ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as YAML: {first_line(error)}") from None
    if not isinstance(tree, dict | None):
        raise UserError(f"{path}: expected a mapping of settings at the top")
    tree = expand_kinds(tree or {})
    base = tree.pop("base", None)
    if base is None:
        return tree
    return merge(read_file(path.parent / str(base), (*seen, path.resolve())), tree)


def parse_override(override: str) -> dict[str, Any]:
    """Turn `section.key=value`, the value in YAML, into a nested dictionary.

    A key in brackets counts as one: `study.grid[optimizer.learning_rate]=[1e-3,3e-3]`.
    """
    key, equals, text = override.partition("=")
    if not equals or not key or "." in (key[0], key[-1]):
        raise UserError(f"override '{override}': expected section.key=value")
    try:
        value = read_yaml(text)
    except (YAMLError, ValueError) as error:
        raise UserError(f"override '{override}': {first_line(error)}") from None
    head, bracket, inner = key.partition("[")
    return nested(head, {inner.removesuffix("]"): value} if bracket else value)


def from_tree(tree: Mapping[str, Any]) -> Config:
    """Check a nested dictionary against the dataclasses, and make a configuration of it.

    Raises:
        UserError: naming the first setting that is unknown, of a wrong type, or impossible.
    """
    return check(Config, expand_kinds(tree), "")


def to_tree(config: Any) -> dict[str, Any]:
    """Turn settings into the nested dictionary that YAML and JSON can hold."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_yaml(config: Config) -> str:
    """Write every setting, defaults included, so that the text stands for itself."""
    return write_yaml(to_tree(config))
