"""What fine-tuning takes over from the run that it starts from. Imports no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kanlm.config import Config, from_tree, merge, to_tree
from kanlm.errors import UserError
from kanlm.training.run_folder import read_config_tree


def inherit(tree: Mapping[str, Any]) -> Config:
    """Complete a fine-tuning config with the base run's model and tokenizer.

    The base run's settings lie under the config's own; stating one of them again with
    another value is refused, `model.dropout` excepted.

    Raises:
        UserError: no `initialize_from`, no such run, or a model or tokenizer that differs.
    """
    start = tree.get("initialize_from")
    if not isinstance(start, str):
        raise UserError("initialize_from is missing: name the run folder to fine-tune")
    base = read_config_tree(Path(start))
    inherited = {key: base[key] for key in ("model", "tokenizer")}
    config = from_tree(merge(inherited, tree))
    check_inherited(to_tree(config), base, start)
    return config


def check_inherited(ours: Mapping[str, Any], base: Mapping[str, Any], start: str) -> None:
    """Check that fine-tuning has the model and tokenizer of its base run.

    Raises:
        UserError: naming the first setting that differs from that in `start`.
    """
    for section in ("model", "tokenizer"):
        for key, value in base[section].items():
            if ours[section][key] != value and (section, key) != ("model", "dropout"):
                raise UserError(
                    f"{section}.{key} = {ours[section][key]} differs from {value} in {start}, "
                    "which fine-tuning inherits"
                )
