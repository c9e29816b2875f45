"""`kanlm generate`: continue a prompt with a finished run's model."""

from pathlib import Path

from kanlm.training.folder import load_config
from kanlm.training.sampling import sample_text
from kanlm.training.trained import load_tokenizer, load_trained


def generate(run: Path, overrides: list[str]) -> str:
    """Return the prompt in the run's `generation` settings with its continuation.

    Raises:
        UserError: no such run, one that has not finished, or an override that goes unread.
    """
    config = load_config(run, overrides, "generate")
    model = load_trained(run)
    tokenizer = load_tokenizer(run)
    return sample_text(model, tokenizer, config.generation, config.seed)
