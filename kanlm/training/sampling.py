"""Samples of what a model writes."""

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from kanlm.config import GenerationSettings


def sample_text(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    settings: GenerationSettings,
    seed: int,
) -> str:
    """Continue `settings.prompt`, or start a document where it is empty.

    Draws from a random state of its own, so that sampling changes nothing in training.
    Returns the prompt and its continuation, up to the end of the document.
    """
    ids = tokenizer.encode(settings.prompt, add_special_tokens=False)
    # A document starts where another ended.
    ids = [tokenizer.eos_token_id, *ids]
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        output = model.generate(  # type: ignore[operator]
            torch.tensor([ids], device=device),
            max_new_tokens=settings.max_new_tokens,
            do_sample=True,
            temperature=settings.temperature,
            top_k=settings.top_k,
            pad_token_id=tokenizer.eos_token_id,
        )
    model.train(was_training)
    text = tokenizer.decode(output[0, 1:], skip_special_tokens=True)
    assert isinstance(text, str)
    return text
