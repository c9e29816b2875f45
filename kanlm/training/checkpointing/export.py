"""What a run has made so far: its `model/` when it is finished, its newest checkpoint before.

`model/` is what transformers' `from_pretrained` loads, under a seal.

What kanlm itself makes of it is the model that the run's own settings describe: config.json
must agree with them and is otherwise left alone, so that nothing it asks of transformers
happens. No code that lies there is run.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kanlm.atomic_io import atomic_folder
from kanlm.checksums import INDEX, find_damage, write_checksums
from kanlm.config import Config, check, from_tree, to_tree
from kanlm.data.corpus import open_corpus, open_tokenizer
from kanlm.data.tokenizer import end_of_document, vocabulary_size
from kanlm.errors import UserError, first_line
from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.model.grids import grid_sizes, with_grid_size
from kanlm.model.settings import ModelSettings
from kanlm.training.checkpointing.reader import checkpoint_step, checkpoint_to_resume, read_state
from kanlm.training.checkpointing.tensors import load_weights
from kanlm.training.grids import grid_size_at
from kanlm.training.resolve import complete_model
from kanlm.training.run_folder import check_weights, first_difference, read_config_tree
from kanlm.untrusted_io import check_plain, read_object

#: What people and the hub's programs put beside a model; transformers reads none of it.
BESIDE = ("README.md", ".gitattributes", ".git", ".cache", ".DS_Store")


@dataclass(frozen=True)
class Newest:
    """A run's newest weights on the disk.

    Attributes:
        place: `model/`, or a checkpoint.
        step: updates done, where the run is not finished; else None.
        steps: updates that the run is to have.
    """

    run: Path
    place: Path
    step: int | None
    steps: int

    def __str__(self) -> str:
        return f"{self.run}" + (
            "" if self.step is None else f" (step {self.step:,} of {self.steps:,})"
        )


def newest(run: Path, report: Callable[[str], None]) -> Newest:
    """Find a run's `model/`, or, before it is finished, its newest intact checkpoint.

    Args:
        report: takes lines on which checkpoint it is, and on damaged ones that are passed over.

    Raises:
        UserError: there is neither, or what there is is damaged.
    """
    check_weights(run)
    steps = _config(run).training.steps
    if (run / "model").exists():
        return Newest(run, model_folder(run), None, steps)
    found = checkpoint_to_resume(run / "checkpoints", report)
    if found is None:
        raise UserError(f"{run / 'checkpoints'} holds no checkpoint")
    step = checkpoint_step(found)
    report(f"{run} is not finished: its newest checkpoint is read, step {step:,} of {steps:,}")
    return Newest(run, found, step, steps)


def load_newest(found: Newest, tokenizer: PreTrainedTokenizerFast) -> KanLMForCausalLM:
    """The model that `newest` found.

    Raises:
        UserError: its files are damaged or of another model than the run's settings describe.
    """
    if found.step is None:
        return load_trained(found.run)
    config = _config(found.run)
    settings, schedule = complete_model(config.model), config.training.grid_schedule
    if schedule is not None:
        # As a checkpoint is written before grids change.
        settings = with_grid_size(settings, grid_size_at(schedule, max(found.step - 1, 0)))
    model = _built(settings, settings.vocab_size or vocabulary_size(tokenizer), tokenizer)
    load_weights(model, found.place)
    _check_finite(model, found.place)
    return model


def newest_tokenizer(found: Newest, report: Callable[[str], None]) -> PreTrainedTokenizerFast:
    """The tokenizer of the model that `newest` found.

    A checkpoint holds none. It is made again as the run made it, and is the same if the tokens of
    the training text are.

    Raises:
        UserError: it cannot be read, or is not that of the checkpoint any more.
    """
    if found.step is None:
        return load_tokenizer(found.run)
    config = _config(found.run)
    tokenizer = run_tokenizer(config, report)
    inherited = config.initialize_from is not None
    if not inherited and config.tokenizer.kind != "bytes":
        corpus = open_corpus(config.data, tokenizer, report=report)
        if corpus.tokens_hash != read_state(found.place).get("tokens_hash"):
            raise UserError(
                f"{found.place} holds no tokenizer, and the text in data '{config.data.domain}' "
                "makes another than it was trained with: bring that text back"
            )
    return tokenizer


def run_tokenizer(config: Config, report: Callable[[str], None]) -> PreTrainedTokenizerFast:
    """The tokenizer that a run trains with: its base run's, or one of its own.

    Raises:
        UserError: it cannot be read or made.
    """
    if config.initialize_from is None:
        return open_tokenizer(config.tokenizer, config.data, report=report)
    return load_tokenizer(Path(config.initialize_from))


def write_model(run: Path, model: KanLMForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write `run/model/`, whole or not at all.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    with atomic_folder(run / "model") as draft:
        model.save_pretrained(draft)
        # Templates of chats would get a folder of their own, which the seal leaves out.
        tokenizer.save_pretrained(draft, save_jinja_files=False)
        write_checksums(draft)


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
    problem = find_damage(place, BESIDE) if sealed else None
    if problem is not None:
        raise UserError(
            f"{place} is damaged: {problem}; bring back a copy, or delete it and results.json, "
            "and the run's command makes it anew"
        )
    return place


def load_trained(run: Path, *, dropout: float | None = None) -> KanLMForCausalLM:
    """The model in a finished run's `model/`.

    Args:
        dropout: in place of the run's.

    Raises:
        UserError: the run is not finished, or its model is damaged or not that of its settings.
    """
    place = model_folder(run)
    settings = _settings(run, place)
    tokenizer = _tokenizer(place)
    size = settings.vocab_size
    own = _run_settings(run).vocab_size or vocabulary_size(tokenizer)
    if size != own:
        raise UserError(
            f"{place / 'config.json'} is of another architecture: vocab_size = {size}, and {own} "
            f"in {run}"
        )
    if dropout is not None:
        settings = replace(settings, dropout=dropout)
    model = _built(settings, own, tokenizer)
    load_weights(model, place)
    _check_finite(model, place / "model.safetensors")
    return model


def _built(
    settings: ModelSettings, vocab_size: int, tokenizer: PreTrainedTokenizerFast
) -> KanLMForCausalLM:
    return KanLMForCausalLM(model_config(settings, vocab_size, tokenizer))


def model_config(
    settings: ModelSettings, vocab_size: int, tokenizer: PreTrainedTokenizerFast
) -> KanLMConfig:
    """The config of a model for documents that the tokenizer's end marker divides.

    In training it stands before a text as well, so that it begins one as it ends one.
    """
    end = end_of_document(tokenizer)
    return KanLMConfig.from_settings(settings, vocab_size, bos_token_id=end, eos_token_id=end)


def _check_finite(model: KanLMForCausalLM, path: Path) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{path} is damaged: {name} holds what is no finite number")


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
    return complete_model(_config(run).model)


def _config(run: Path) -> Config:
    return from_tree(read_config_tree(run))


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
