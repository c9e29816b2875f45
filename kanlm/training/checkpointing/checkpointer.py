"""When and what a run saves, and how it resumes: the loop's side of `writer` and `reader`."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kanlm.config import check
from kanlm.errors import UserError
from kanlm.faults import fault_point
from kanlm.training.checkpointing import reader
from kanlm.training.checkpointing.callback_state import collect_state, load_state, split_state
from kanlm.training.checkpointing.tensors import load_weights, moments, weights
from kanlm.training.checkpointing.writer import Writer
from kanlm.training.distributed import gather_results, run_on_main
from kanlm.training.sharding import reshard
from kanlm.training.state import TrainingState
from kanlm.training.tracking import print_line

if TYPE_CHECKING:
    from kanlm.training.trainer import Trainer


class Checkpointer:
    """Saves a run and resumes it, bit for bit.

    Args:
        trainer: the run.
    """

    def __init__(self, trainer: "Trainer") -> None:
        self.trainer = trainer
        self.folder = trainer.folder / "checkpoints"
        accelerator = trainer.accelerator
        wanted = trainer.config.training.background_checkpoints
        background = wanted == "on" or (wanted == "auto" and accelerator.device.type != "cpu")
        self.writer = Writer(accelerator, self.folder, background=background)

    @property
    def keeps_best(self) -> bool:
        """Whether the checkpoint of the best validation is kept."""
        training = self.trainer.config.training
        return training.keep_best_checkpoint or training.early_stopping_patience is not None

    def save(self) -> None:
        """Begin a checkpoint from which the run continues bit for bit.

        Raises:
            UserError: nothing can be written, or the text has changed meanwhile, so that the
                steps since the last checkpoint count for nothing.
        """
        trainer = self.trainer
        with trainer.phases.of("checkpoint"), trainer.pace.of("checkpoint"):
            state = trainer.state
            state.window = trainer.accumulator.read()
            corpus = trainer.corpora[trainer.config.data.domain]
            run_on_main(trainer.accelerator, corpus.check_unchanged)
            reshard(trainer.model)
            tensors, state.callbacks = collect_state(trainer.callbacks)
            state.wandb_id = trainer.tracker.wandb_id
            state.metrics_lines = trainer.tracker.lines
            self.writer.start(
                state.step,
                {
                    "model": weights(trainer.model),
                    "optimizer": moments(trainer.model, trainer.optimizer),
                    "callbacks": tensors,
                },
                asdict(state),
                keep=trainer.config.training.keep_checkpoints,
                best_step=state.best_step if self.keeps_best else None,
            )

    def finish(self) -> None:
        """Wait until the checkpoint that was begun is in its place."""
        with self.trainer.phases.of("checkpoint"):
            self.writer.finish()

    def write_left(self, left: Mapping[str, Mapping[str, Any]]) -> None:
        """Write what callbacks leave to the run that will be fine-tuned from this one.

        Args:
            left: by callback and name; nothing is written where there is none.
        """
        if left:
            reshard(self.trainer.model)
            tensors, values = split_state(left)
            self.writer.write(self.trainer.folder / "callbacks", {"callbacks": tensors}, values)

    def load_best(self) -> None:
        """Go back to the weights of the best validation."""
        trainer, step = self.trainer, self.trainer.state.best_step
        best = run_on_main(trainer.accelerator, lambda: reader.best_checkpoint(self.folder, step))
        reshard(trainer.model)
        load_weights(trainer.model, best)

    def resume(self) -> None:
        """Continue from the newest intact checkpoint, if there is one.

        Raises:
            UserError: none is intact, or it is of another model, text or other callbacks.
        """
        trainer, domain = self.trainer, self.trainer.config.data.domain
        found = run_on_main(
            trainer.accelerator, lambda: reader.checkpoint_to_resume(self.folder, print_line)
        )
        if found is None:
            return
        state = check(TrainingState, reader.read_state(found), str(found / "state.json"))
        if state.tokens_hash != trainer.state.tokens_hash:
            raise UserError(
                f"{found} was trained on other text than there is now in data '{domain}': bring "
                "that text back, or choose another output_dir"
            )
        names = [callback.name for callback in trainer.callbacks]
        if state.pending is not None and state.pending not in names:
            raise UserError(
                f"{found} was written before callback {state.pending} had done what it does after "
                "a step: resume with it, or choose another output_dir"
            )
        trainer.state = state
        if trainer.accelerator.is_main_process:
            print_line(f"resuming from {found}")
        for callback in trainer.callbacks:
            callback.before_resume(state.step)

        def load() -> None:
            reader.load_checkpoint(found, trainer.model, trainer.optimizer)
            load_state(trainer.callbacks, found, state.callbacks)

        gather_results(trainer.accelerator, load)
        fault_point("inside-resume")
        trainer.accumulator.start(state.window)
        self._resume_random_numbers(found)

    def _resume_random_numbers(self, checkpoint: Path) -> None:
        """Continue each rank's own, or start new ones where there were other ranks."""
        accelerator, config = self.trainer.accelerator, self.trainer.config
        rank, now = accelerator.process_index, accelerator.num_processes
        before = reader.ranks_of(checkpoint)
        if before == now:
            reader.load_random_state(checkpoint, rank)
            return
        draw = np.random.SeedSequence([config.seed, self.trainer.state.step, now, rank])
        torch.manual_seed(int(draw.generate_state(1, np.uint64)[0]))
        if accelerator.is_main_process:
            dropout = "; dropout draws other numbers from here" if config.model.dropout else ""
            print_line(
                f"{checkpoint} was written by {before} processes and is read by {now}{dropout}"
            )
