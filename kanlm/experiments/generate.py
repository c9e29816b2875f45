"""`kanlm generate`: continue a prompt with a finished run's model."""

from pathlib import Path

from transformers import AutoTokenizer

from kanlm.training.checkpoint import load_trained
from kanlm.training.folder import load_config
from kanlm.training.sampling import sample_text


def generate(run: Path, overrides: list[str]) -> str:
    """Return the prompt in the run's `generation` settings with its continuation.

    Raises:
        UserError: no such run, or one that has not finished.
    """
    config = load_config(run, overrides)
    model = load_trained(run)
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    return sample_text(model, tokenizer, config.generation, config.seed)
