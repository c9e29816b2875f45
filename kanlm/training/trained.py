"""The model and tokenizer that a finished run leaves in `model/`."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kanlm.errors import UserError, first_line
from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.training.stored import load_weights


def model_folder(run: Path) -> Path:
    """Where a finished run keeps its model and tokenizer.

    Raises:
        UserError: the run is not finished.
    """
    if not (run / "model").exists():
        raise UserError(f"{run} has no model/ yet: finish that run first")
    return run / "model"


def load_trained(run: Path, **settings: Any) -> KanLMForCausalLM:
    """The model in a finished run's `model/`, with other `settings` such as dropout.

    Raises:
        UserError: the run is not finished, or its weights are not those of its model.
    """
    place = model_folder(run)
    try:
        kind = json.loads((place / "config.json").read_text()).get("model_type")
        if kind != KanLMConfig.model_type:
            raise UserError(f"{place} is of another architecture: model_type is {kind}")
        model = KanLMForCausalLM(KanLMConfig.from_pretrained(place, **settings))
    except (OSError, ValueError) as error:
        raise UserError(f"{place / 'config.json'} cannot be read: {error}") from None
    load_weights(model, place)
    return model


def load_tokenizer(run: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a finished run's `model/`; code that lies there is not run.

    Raises:
        UserError: the run is not finished, or its tokenizer cannot be read.
    """
    place = model_folder(run)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            place, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # What tokenizers raises is a bare Exception.
        raise UserError(f"{place}: the tokenizer cannot be read: {first_line(error)}") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{place}: the tokenizer has no fast version (tokenizer.json)")
    return tokenizer
