"""`kanlm generate`: continue a prompt with a run's model."""

import sys
from pathlib import Path

from kanlm.training.checkpointing.export import load_newest, newest, newest_tokenizer
from kanlm.training.run_folder import load_config
from kanlm.training.sampling import device_at_hand, sample_text


def generate(run: Path, overrides: list[str]) -> str:
    """Return the prompt in the run's `generation` settings with its continuation.

    Of an unfinished run the newest checkpoint is read, and a line on standard error says so.

    Raises:
        UserError: no such run, one without weights yet, or an override that goes unread.
    """
    config = load_config(run, overrides, "generate")
    weights = newest(run, _tell)
    tokenizer = newest_tokenizer(weights, _tell)
    model = load_newest(weights, tokenizer).to(device_at_hand())  # pyright: ignore
    return sample_text(model, tokenizer, config.generation, config.seed)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
