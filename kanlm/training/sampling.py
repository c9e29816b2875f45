"""Samples of what a model writes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, PreTrainedTokenizerFast

from kanlm.config import GenerationSettings
from kanlm.training.callbacks import Callback


def sample_text(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    settings: GenerationSettings,
    seed: int,
    between: Callable[[], None] = lambda: None,
) -> str:
    """Continue `settings.prompt`, or start a document where it is empty.

    Draws from a random state of its own, so that sampling changes nothing in training.

    Args:
        between: called before each token; it may raise to end the sample.

    Returns: the prompt and its continuation, up to the end of the document.
    """
    ids = tokenizer.encode(settings.prompt, add_special_tokens=False)
    # A document starts where another ended.
    ids = [tokenizer.eos_token_id, *ids]
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    drawing = {"temperature": settings.temperature, "top_k": settings.top_k}
    greedy = settings.temperature == 0
    try:
        with seeded(device, seed), torch.no_grad():
            output = model.generate(  # type: ignore[operator]
                torch.tensor([ids], device=device),
                max_new_tokens=settings.max_new_tokens,
                do_sample=not greedy,
                **({} if greedy else drawing),
                pad_token_id=tokenizer.eos_token_id,
                logits_processor=[_Calling(between)],
            )
    finally:
        model.train(was_training)
    text = tokenizer.decode(output[0, 1:], skip_special_tokens=True)
    assert isinstance(text, str)
    return text


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the generators of the host and of one device, and set them back at the end.

    Other devices are left alone: to ask for their state would start a context on each.
    """
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            yield
        return
    module = torch.get_device_module(device)
    with torch.random.fork_rng(devices=[device], device_type=device.type):
        torch.default_generator.manual_seed(seed)
        with torch.accelerator.device_index(device.index):
            module.manual_seed(seed)
        yield


def device_at_hand() -> torch.device:
    """The accelerator that training would use, or the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


class Samples(Callback):
    """Writes a `sample` line every `training.sample_every` steps and at the end.

    Args:
        tokenizer: of the run.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer

    def after_step(self) -> None:
        """Sample where it is due."""
        trainer, accelerator = self.trainer, self.trainer.accelerator
        if not (trainer.finished or trainer.due(trainer.config.training.sample_every)):
            return
        trainer.check_stop()
        text, settings = None, trainer.config.generation
        # A sharded model needs all ranks, which draw the same tokens.
        if accelerator.is_main_process or trainer.placement.sharded:
            # One rank alone cannot stop.
            between = trainer.check_stop if accelerator.num_processes == 1 else lambda: None
            with trainer.phases.of("sample"), trainer.pace.of("sample"):
                text = sample_text(
                    trainer.model, self.tokenizer, settings, trainer.config.seed, between
                )
        trainer.record("sample", {"prompt": settings.prompt, "text": text})


class _Calling(LogitsProcessor):
    """Leaves the scores as they are, and calls a function before every token."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.call()
        return scores
