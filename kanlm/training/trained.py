"""A finished run's `model/`: what transformers' `from_pretrained` loads, under a seal.

What kanlm itself makes of it is the model that the run's own settings describe: config.json
must agree with them and is otherwise left alone, so that nothing it asks of transformers
happens. No code that lies there is run.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kanlm.config import check, from_tree, to_tree
from kanlm.data.tokenizer import end_of_document
from kanlm.errors import UserError, first_line
from kanlm.files import replacing
from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.model.grids import grid_sizes, with_grid_size
from kanlm.model.settings import ModelSettings
from kanlm.reading import check_plain, read_object
from kanlm.training.folder import first_difference, read_config_tree
from kanlm.training.resolve import complete_model
from kanlm.training.seal import INDEX, damage, seal
from kanlm.training.stored import load_weights

#: What people and the hub's programs put beside a model; transformers reads none of it.
BESIDE = ("README.md", ".gitattributes", ".git", ".cache", ".DS_Store")


def write_model(run: Path, model: KanLMForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write `run/model/`, whole or not at all.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    with replacing(run / "model") as draft:
        model.save_pretrained(draft)
        # Templates of chats would get a folder of their own, which the seal leaves out.
        tokenizer.save_pretrained(draft, save_jinja_files=False)
        seal(draft)


def model_folder(run: Path) -> Path:
    """Where a finished run keeps its model and tokenizer, known to be as they were written.

    One without a seal, as `save_pretrained` leaves it, is taken as it is.

    Raises:
        UserError: the run is not finished, or the folder is damaged.
    """
    place = run / "model"
    if not place.exists():
        raise UserError(f"{run} has no model/ yet: finish that run first")
    try:
        for path in place.iterdir():
            if path.name not in BESIDE:
                check_plain(path)
        sealed = (place / INDEX).exists()
    except OSError as error:
        raise UserError(f"{place} cannot be read: {error.strerror}") from None
    problem = damage(place, BESIDE) if sealed else None
    if problem is not None:
        raise UserError(
            f"{place} is damaged: {problem}; bring back a copy, or delete it and results.json, "
            "and the run's command makes it anew"
        )
    return place


def load_trained(run: Path, *, dropout: float | None = None) -> KanLMForCausalLM:
    """The model in a finished run's `model/`.

    Arguments:
        dropout: in place of the run's.

    Raises:
        UserError: the run is not finished, or its model is damaged or not that of its settings.
    """
    place = model_folder(run)
    settings = _settings(run, place)
    tokenizer = _tokenizer(place)
    size, own = settings.vocab_size, _run_settings(run).vocab_size or len(tokenizer)
    if size != own:
        raise UserError(
            f"{place / 'config.json'} is of another architecture: vocab_size = {size}, and {own} "
            f"in {run}"
        )
    if dropout is not None:
        settings = replace(settings, dropout=dropout)
    model = KanLMForCausalLM(
        KanLMConfig.from_settings(settings, own, eos_token_id=end_of_document(tokenizer))
    )
    load_weights(model, place)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(
                f"{place / 'model.safetensors'} is damaged: {name} holds what is no finite number"
            )
    return model


def load_tokenizer(run: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a finished run's `model/`; code that lies there is not run.

    Raises:
        UserError: the run is not finished, or its tokenizer cannot be read.
    """
    place = model_folder(run)
    # transformers makes a config of config.json here, too, however large a model it claims.
    _settings(run, place)
    return _tokenizer(place)


def _tokenizer(place: Path) -> PreTrainedTokenizerFast:
    _refuse_code(place / "tokenizer_config.json", read_object(place / "tokenizer_config.json"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            place, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # What tokenizers raises is a bare Exception.
        raise UserError(f"{place}: the tokenizer cannot be read: {first_line(error)}") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{place}: the tokenizer has no fast version (tokenizer.json)")
    if not isinstance(tokenizer.eos_token_id, int):
        raise UserError(f"{place}: the tokenizer has no eos token to end documents with")
    return tokenizer


def _refuse_code(path: Path, contents: Mapping[str, Any]) -> None:
    if "auto_map" in contents:
        raise UserError(f"{path}: auto_map asks for code of its own, which is not run")


def _run_settings(run: Path) -> ModelSettings:
    """The model that a run's own settings describe."""
    return complete_model(from_tree(read_config_tree(run)).model)


def _settings(run: Path, place: Path) -> ModelSettings:
    """The settings in config.json, which are the run's but for the size of the vocabulary.

    Raises:
        UserError: they are not, or cannot be read.
    """
    path = place / "config.json"
    stated = read_object(path)
    kind = stated.get("model_type")
    if kind != KanLMConfig.model_type:
        raise UserError(f"{place} is of another architecture: model_type is {kind!r}")
    _refuse_code(path, stated)
    tree = {f.name: stated[f.name] for f in fields(ModelSettings) if f.name in stated}
    theirs: ModelSettings = check(ModelSettings, tree, str(path))
    ours = replace(_run_settings(run), vocab_size=theirs.vocab_size)
    try:
        theirs = complete_model(theirs)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    # Stopped early, a run leaves grids that are not refined yet.
    largest = max(grid_sizes(ours), default=1)
    found, expected = (to_tree(with_grid_size(each, largest)) for each in (theirs, ours))
    different = first_difference(found, expected)
    if different is not None:
        name, value, wanted = different
        raise UserError(
            f"{path} is of another architecture: {name} = {value}, and {wanted} in {run}"
        )
    too_large = [size for size in grid_sizes(theirs) if size > largest]
    if too_large:
        raise UserError(f"{path}: grid_size = {too_large[0]}, and at most {largest} in {run}")
    return theirs
