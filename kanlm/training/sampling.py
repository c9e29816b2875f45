"""Samples of what a model writes."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, PreTrainedTokenizerFast

from kanlm.config import GenerationSettings


def sample_text(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    settings: GenerationSettings,
    seed: int,
    between: Callable[[], None] = lambda: None,
) -> str:
    """Continue `settings.prompt`, or start a document where it is empty.

    Draws from a random state of its own, so that sampling changes nothing in training.

    Arguments:
        between: called before each token; it may raise to end the sample.

    Returns: the prompt and its continuation, up to the end of the document.
    """
    ids = tokenizer.encode(settings.prompt, add_special_tokens=False)
    # A document starts where another ended.
    ids = [tokenizer.eos_token_id, *ids]
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            output = model.generate(  # type: ignore[operator]
                torch.tensor([ids], device=device),
                max_new_tokens=settings.max_new_tokens,
                do_sample=True,
                temperature=settings.temperature,
                top_k=settings.top_k,
                pad_token_id=tokenizer.eos_token_id,
                logits_processor=[_Calling(between)],
            )
    finally:
        model.train(was_training)
    text = tokenizer.decode(output[0, 1:], skip_special_tokens=True)
    assert isinstance(text, str)
    return text


class _Calling(LogitsProcessor):
    """Leaves the scores as they are, and calls a function before every token."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.call()
        return scores
