"""The text that a run's base was trained on, and the base's base, as rows to train on again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from kanlm.config import Config, from_tree
from kanlm.data.corpus import Corpus, open_corpus
from kanlm.data.loader import Batches
from kanlm.errors import UserError
from kanlm.training.callbacks import Batch
from kanlm.training.checkpointing.reader import checkpoint_folder, read_state
from kanlm.training.run_folder import checkpoint_steps, read_config_tree


@dataclass(frozen=True)
class Earlier:
    """A run that this one starts from, directly or through others, and its text."""

    folder: Path
    config: Config
    corpus: Corpus


def open_earlier(
    config: Config, tokenizer: PreTrainedTokenizerFast, report: Callable[[str], None]
) -> list[Earlier]:
    """Open the training text of every run that this one starts from, the first run's first.

    Raises:
        UserError: a run's folder or text is not there, or the text is not what the run read.
    """
    found: list[Earlier] = []
    start = config.initialize_from
    while start is not None:
        folder = Path(start)
        earlier = from_tree(read_config_tree(folder))
        wanted = f"strategy.kind = {config.strategy['kind']} needs the text of {folder}"
        try:
            corpus = open_corpus(earlier.data, tokenizer, report=report)
        except UserError as error:
            raise UserError(f"{wanted}: {error}") from None
        if corpus.tokens_hash != _tokens_hash(folder, corpus.tokens_hash):
            raise UserError(f"{wanted}, which has changed since: bring that text back")
        found.insert(0, Earlier(folder, earlier, corpus))
        start = earlier.initialize_from
    return found


def _tokens_hash(folder: Path, default: str) -> str:
    """Of the text that a run was trained on, by its newest checkpoint if there is one."""
    steps = checkpoint_steps(folder / "checkpoints")
    if not steps:
        return default
    state = read_state(checkpoint_folder(folder / "checkpoints", steps[0]))
    return state.get("tokens_hash", default)


class OldText:
    """Endless rows of the texts of earlier runs, in turn.

    Row n is row n // T of text n mod T, of T texts, in the order that this run's seed draws for
    that text.

    Args:
        config: of the run that reads them.
        earlier: the runs that it starts from, the first one first.
    """

    def __init__(self, config: Config, earlier: Sequence[Earlier]) -> None:
        self.earlier = earlier

        def batches(each: Earlier, seed: int) -> Batches:
            return Batches(
                each.corpus,
                seed=seed,
                batch_size=each.config.training.batch_size,
                context_length=config.model.context_length,
                attention_within_documents=config.data.attention_within_documents,
            )

        self.batches = [batches(each, config.seed) for each in earlier]
        self.continued = batches(earlier[0], earlier[0].config.seed)

    @property
    def hashes(self) -> list[str]:
        """Of the texts' tokens."""
        return [each.corpus.tokens_hash for each in self.earlier]

    def row(self, number: int) -> Batch:
        """Row `number`, (1, context_length)."""
        return row(self.batches[number % len(self.batches)], number // len(self.batches))

    def first_text_row(self, number: int) -> Batch:
        """Row `number` of the first run's text alone, in that run's order from where it ended."""
        training = self.earlier[0].config.training
        return row(self.continued, training.steps * training.batch_size + number)


def row(batches: Batches, number: int) -> Batch:
    """Row `number` of a series of batches, (1, context_length)."""
    size = batches.batch_size
    return batches.batch(number // size, number % size, size)


def stack(rows: Sequence[Batch]) -> dict[str, torch.Tensor]:
    """Rows as one batch."""
    return {key: torch.cat([each[key] for each in rows]) for key in rows[0]}
