"""Validation while a model trains: its figures, and where the inputs of KAN layers fall."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from accelerate import Accelerator
from torch import nn

from kanlm.config import Config
from kanlm.data.corpus import Corpus
from kanlm.evaluation.perplexity import Evaluation, evaluate
from kanlm.model.grids import first_sequences, occupancies
from kanlm.training.callbacks import Callback
from kanlm.training.distributed import sum_over_ranks


class Evaluator:
    """Evaluates on every domain of a run, each in one full pass that the ranks divide.

    Args:
        corpora: domain → its text, the domain trained on first.
    """

    def __init__(
        self, config: Config, accelerator: Accelerator, corpora: dict[str, Corpus]
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.corpora = corpora

    def evaluate(
        self, model: nn.Module, domain: str, split: str, between: Callable[[], None] = lambda: None
    ) -> Evaluation:
        """Evaluate on a domain's split.

        Args:
            model: without wrappers.
            between: called after every forward pass; it may raise to end the evaluation.
        """
        config, accelerator = self.config, self.accelerator
        several = accelerator.num_processes > 1
        with accelerator.autocast():
            return evaluate(
                model,
                self.corpora[domain].split(split),
                context_length=config.model.context_length,
                stride=config.evaluation.stride or config.model.context_length,
                batch_size=config.evaluation.batch_size,
                attention_within_documents=config.data.attention_within_documents,
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
                reduce=partial(sum_over_ranks, accelerator) if several else None,
                device=accelerator.device,
                between=between,
            )


class Validation(Callback):
    """Writes `validation` and `grid` lines every `training.evaluate_every` steps and at the end.

    Args:
        evaluator: of the run.
    """

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator

    def after_step(self) -> None:
        """Validate where it is due."""
        trainer = self.trainer
        if trainer.is_last or trainer.due(trainer.config.training.evaluate_every):
            trainer.check_stop()
            self.validate()

    def validate(self) -> None:
        """Evaluate, log, and remember the best nats per token of the domain trained on."""
        trainer, state = self.trainer, self.trainer.state
        with trainer.phases.of("validation"), trainer.pace.of("validation"):
            found = [
                figures(
                    domain,
                    self.evaluator.evaluate(
                        trainer.model, domain, "validation", trainer.check_stop
                    ),
                )
                for domain in self.evaluator.corpora
            ]
        for values in found:
            trainer.record("validation", values)
            trainer.tracker.print_line(
                f"step {state.step}: {values['domain']} "
                f"{values['bits_per_byte']:.4f} bits per byte, "
                f"{values['nats_per_token']:.4f} nats per token"
            )
        self._log_occupancy()
        loss = found[0]["nats_per_token"]
        state.last_loss, best = loss, state.best_loss
        if math.isfinite(loss) and (best is None or loss < best):
            state.best_loss, state.best_step = loss, state.step
            state.stale_validations = 0
        else:
            state.stale_validations += 1
        for callback in trainer.callbacks:
            callback.after_validation(found)

    def _log_occupancy(self) -> None:
        """Log where the inputs of KAN layers fall, on some training text of this step."""
        trainer, accelerator = self.trainer, self.trainer.accelerator
        batch = trainer.batches.batch(
            trainer.state.step - 1, accelerator.process_index, accelerator.num_processes
        )
        found = occupancies(trainer.model, first_sequences(batch, accelerator.device))
        values: dict[str, Any] = {}
        for name, occupancy in found.items():
            occupancy.sums = sum_over_ranks(accelerator, occupancy.sums)
            values[f"{name}/in_range"] = occupancy.in_range.mean().item()
            values[f"{name}/use"] = occupancy.use.mean(dim=0).tolist()
        if values:
            trainer.record("grid", values)


def figures(domain: str, evaluation: Evaluation) -> dict[str, Any]:
    """The figures of a validation line in metrics.jsonl."""
    return {
        "domain": domain,
        "nats_per_token": evaluation.nats_per_token,
        "bits_per_byte": evaluation.bits_per_byte,
        "token_perplexity": evaluation.token_perplexity,
    }
