"""How a configuration comes together, and how it is written.

1. A YAML file may name a `base:` file; it is laid over it, and so on down.
2. `section.key=value` overrides from the command line are laid on top.
3. The result is checked against the dataclasses of `schema`: an unknown key, a wrong type
   or an impossible combination is refused in one line that names the setting.

PyYAML reads, by the rules of YAML 1.2, OmegaConf merges, and pydantic checks types.
"""

import dataclasses
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yaml import YAMLError

from kanlm.config.checking import check
from kanlm.config.merging import expand_kinds, merge, nested
from kanlm.config.plain_yaml import check_yaml, read_yaml, write_yaml
from kanlm.config.schema import Config
from kanlm.errors import UserError, first_line


def load(
    path: str | Path, overrides: list[str] | None = None, over: Mapping[str, Any] | None = None
) -> Config:
    """Read a YAML file with its bases, lay dotted overrides on top, and check it all.

    Arguments:
        over: a nested dictionary that is laid over even these.

    Raises:
        UserError: a file is missing or no YAML, or a setting is unknown or impossible.
    """
    overrides = overrides or []
    _refuse_commands(read_tree(path, []), path)
    return from_tree(merge(read_tree(path, overrides), over or {}))


def _refuse_commands(tree: Mapping[str, Any], path: str | Path) -> None:
    """A file from somebody else must not be able to start a program."""
    study = tree.get("study")
    command = study.get("launcher") if isinstance(study, dict) else None
    if command is not None:
        raise UserError(
            f"{path}: study.launcher is a command, and is taken from the command line alone: "
            f"give it as study.launcher={shlex.quote(str(command))}, and null here"
        )


def read_tree(path: str | Path, overrides: list[str]) -> dict[str, Any]:
    """Read and merge as `load` does, without checking: a nested dictionary."""
    tree = _read_file(Path(path), seen=())
    for override in overrides:
        tree = merge(tree, parse_override(override))
    return tree


def from_tree(tree: Mapping[str, Any]) -> Config:
    """Check a nested dictionary against the dataclasses.

    Raises:
        UserError: naming the first setting that is unknown, mistyped or impossible.
    """
    return check(Config, expand_kinds(dict(tree)), "")


def to_tree(config: Any) -> dict[str, Any]:
    """Turn settings into the nested dictionary that YAML and JSON can hold."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_yaml(config: Config) -> str:
    """Write every setting, defaults included, so that the text stands for itself."""
    return write_yaml(to_tree(config))


def parse_override(override: str) -> dict[str, Any]:
    """Turn `section.key=value`, the value in YAML, into a nested dictionary.

    A key in brackets counts as one: `study.grid[optimizer.learning_rate]=[1e-3,3e-3]`.
    """
    key, equals, text = override.partition("=")
    if not equals or not key or "." in (key[0], key[-1]):
        raise UserError(f"override '{override}': expected section.key=value")
    try:
        value = read_yaml(text)
    except (YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"override '{override}': {first_line(error)}") from None
    head, bracket, inner = key.partition("[")
    tree = {inner.removesuffix("]"): value} if bracket else value
    return nested(head, tree)


def _read_file(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise UserError(f"{path}: `base:` leads back to the same file")
    try:
        text = path.read_text(encoding="utf-8")
        check_yaml(text)
        tree = read_yaml(text)
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except (YAMLError, ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as YAML: {first_line(error)}") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of settings at the top")
    tree = {str(key): value for key, value in tree.items()}
    base = tree.pop("base", None)
    if base is None:
        return expand_kinds(tree)
    return merge(_read_file(path.parent / str(base), (*seen, path.resolve())), tree)
