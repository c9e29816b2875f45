"""A last fit of the coefficients alone, by a method that needs a fixed objective.

Over its coefficients a KAN layer is linear, and small KANs are fitted with L-BFGS. A
language model is trained on a new batch every step, which L-BFGS cannot be; but once
training is over, the coefficients can be brought to the minimum of one large batch. They
can also be brought to fit that batch and nothing else: so validation is logged before and
after, and this is off unless asked for.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kanlm.kan.penalties import edge_layers
from kanlm.training.callbacks import Callback
from kanlm.training.step import loss_terms
from kanlm.training.validation import Validation

#: Pairs of steps that L-BFGS remembers, each as large as all coefficients twice over.
HISTORY = 10
#: Evaluations that one line search may take.
LINE_SEARCH = 25


@dataclass(frozen=True)
class Polish:
    """What a polish did. Losses are the objective on its batch, in nats a token."""

    loss_before: float
    #: Equal to that before where no better coefficients were found and the old ones stay.
    loss_after: float
    iterations: int
    #: Passes over the batch, forward and backward.
    evaluations: int
    #: In the batch, over all processes.
    tokens: int
    seconds: float


class PolishAtEnd(Callback):
    """Polishes the coefficients on the batches after the last, and validates again.

    Args:
        validation: of the run.
    """

    def __init__(self, validation: Validation) -> None:
        self.validation = validation
        self.polished = False

    def after_step(self) -> None:
        """Polish after the last step, as `training.polish_steps` says."""
        trainer = self.trainer
        if not (trainer.is_last and trainer.config.training.polish_steps):
            return
        trainer.check_stop()
        if not self.polished:
            self._polish()
            self.polished = True
            trainer.check_stop()
        before = trainer.state.last_loss
        self.validation.validate()
        after = trainer.state.last_loss
        assert before is not None
        assert after is not None
        worse = "; validation got worse: leave out training.polish_steps, or raise "
        trainer.tracker.print_line(
            f"polished: {before:.4f} to {after:.4f} nats per token in validation"
            f"{worse + 'polish_batch_size' if after > before else ''}"
        )

    def _polish(self) -> None:
        trainer, training = self.trainer, self.trainer.config.training
        count = (training.polish_batch_size or training.batch_size) // training.batch_size
        rank, ranks = trainer.accelerator.process_index, trainer.accelerator.num_processes
        outcome = polish(
            trainer.accelerator,
            trainer.model,
            [trainer.batch(training.steps + i, rank, ranks) for i in range(count)],
            micro_batch_size=training.micro_batch_size,
            steps=training.polish_steps,
            options=trainer.forward_options,
            terms=lambda *arguments: loss_terms(trainer.callbacks, *arguments).values(),
            penalties=lambda: [each.penalty(trainer.model) for each in trainer.callbacks],
            between=trainer.check_stop,
        )
        trainer.state.seconds += outcome.seconds
        trainer.state.tokens += outcome.tokens
        trainer.record("polish", asdict(outcome))
        trainer.tracker.print_line(
            f"polished in {outcome.iterations} iterations: {outcome.loss_before:.4f} to "
            f"{outcome.loss_after:.4f} nats per token on its batch"
        )

    def state_dict(self) -> dict[str, Any]:
        """Whether the validation after it is all that is left to do."""
        return {"polished": self.polished}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the polish, where a stop came between the two."""
        self.polished = state["polished"]


def coefficients(model: nn.Module) -> list[nn.Parameter]:
    """The trainable coefficients of a model's edge functions."""
    owned = [layer.coefficients for layer in edge_layers(model)]
    return [parameter for parameter in owned if parameter.requires_grad]


def polish(
    accelerator: Accelerator,
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    micro_batch_size: int | None,
    steps: int,
    options: Mapping[str, Any] = MappingProxyType({}),
    terms: Callable[[Mapping[str, Tensor], Any, Tensor], Iterable[Tensor]] = lambda *_: (),
    penalties: Callable[[], Iterable[Tensor | None]] = lambda: (),
    between: Callable[[], None] = lambda: None,
) -> Polish:
    """Move the coefficients by L-BFGS with strong Wolfe line searches (Liu & Nocedal 1989).

    The objective is training's, without dropout: the mean loss of all tokens, and what
    callbacks add to it. Losses and gradients are summed over ranks, so that all of them take
    the same steps.

    Args:
        model: unwrapped; its forward takes `shift_labels` and `num_items_in_batch`.
        batches: this rank's rows of what is together one batch.
        micro_batch_size: sequences in one forward pass; None takes those of a batch.
        steps: iterations at most.
        options: of the model's forward.
        terms: what is added to the loss of a micro-batch, given it, the model's outputs and the
            tokens of all batches.
        penalties: what is added of the weights alone.
        between: called before each pass over the batch; where it raises, the coefficients are
            as before.
    """
    started = time.perf_counter()
    parameters = coefficients(model)
    before = [parameter.detach().clone() for parameter in parameters]
    pieces = [
        {key: value.to(accelerator.device) for key, value in piece.items()}
        for batch in batches
        for piece in _split(batch, micro_batch_size)
    ]
    counts = torch.stack([(piece["shift_labels"] != -100).sum() for piece in pieces])
    tokens = accelerator.reduce(counts.sum(), "sum")
    assert isinstance(tokens, Tensor)
    evaluations = 0

    def objective() -> Tensor:
        nonlocal evaluations
        between()
        evaluations += 1
        # The loss, and after it the gradient of each parameter.
        loss = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        sums: list[Any] = [loss, *map(torch.zeros_like, parameters)]
        for piece in pieces:
            output = model(**piece, num_items_in_batch=tokens, **options)
            _add(sums, sum(terms(piece, output, tokens), start=output.loss), parameters)
        sums = list(accelerator.reduce(sums, "sum"))
        for penalty in penalties():
            if penalty is not None:
                _add(sums, penalty, parameters)
        for parameter, gradient in zip(parameters, sums[1:], strict=True):
            parameter.grad = gradient
        return sums[0]

    was_training = model.training
    model.eval()
    try:
        first, last, iterations = _minimise(objective, parameters, steps)
    except BaseException:
        _put_back(parameters, before)
        raise
    finally:
        model.train(was_training)
    if not last < first:
        # Worse or not a number: rounding has misled the line search.
        last = first
        _put_back(parameters, before)
    return Polish(
        loss_before=first,
        loss_after=last,
        iterations=iterations,
        evaluations=evaluations,
        tokens=int(tokens),
        seconds=time.perf_counter() - started,
    )


def _minimise(
    objective: Callable[[], Tensor], parameters: Sequence[nn.Parameter], steps: int
) -> tuple[float, float, int]:
    """The objective before and after L-BFGS, and the iterations it took.

    Args:
        objective: sets the parameters' gradients and returns the loss.
    """
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=steps,
        max_eval=LINE_SEARCH * steps,
        history_size=HISTORY,
        line_search_fn="strong_wolfe",
    )
    first = float(optimizer.step(objective))
    last = float(objective())
    optimizer.zero_grad()
    return first, last, optimizer.state[parameters[0]]["n_iter"]


@torch.no_grad()
def _put_back(parameters: Sequence[nn.Parameter], before: Sequence[Tensor]) -> None:
    for parameter, old in zip(parameters, before, strict=True):
        parameter.copy_(old)
        parameter.grad = None


def _split(batch: Mapping[str, Tensor], size: int | None) -> Iterator[dict[str, Tensor]]:
    rows = len(batch["input_ids"])
    for start in range(0, rows, size or rows):
        yield {key: value[start : start + (size or rows)] for key, value in batch.items()}


def _add(sums: Sequence[Tensor], loss: Tensor, parameters: Sequence[nn.Parameter]) -> None:
    """Add a loss and its gradients to `sums`. An expert that no token chose has none."""
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    for total, value in zip(sums, [loss.detach(), *gradients], strict=True):
        total.add_(value)
