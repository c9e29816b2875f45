"""Strategies that choose which rows a step trains on."""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any

import numpy as np
from annotated_types import Gt, Lt

from kanlm.config.schema.types import PositiveInt
from kanlm.errors import UserError
from kanlm.training.callbacks import Batch
from kanlm.training.strategies.base import Strategy
from kanlm.training.strategies.old_text import stack


class _OldRows(Strategy):
    """Base class of strategies that train on old text, whose hashes are in checkpoints."""

    reads_old_text = True

    def state_dict(self) -> dict[str, Any]:
        """Hashes of the old text's tokens; the rows are a function of seed and step."""
        return {"old_text": self.old_text.hashes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compare the old text with that of the run's start.

        Raises:
            UserError: it is another.
        """
        if state["old_text"] != self.old_text.hashes:
            raise UserError(
                f"strategy.kind = {self.name}: the old text has changed since this run was "
                "started: bring that text back, or choose another output_dir"
            )


class Replay(_OldRows):
    """Takes a fraction of each batch's rows from the text of the runs that this one starts from.

    The number of rows stays, so that a run sees as many tokens as by `plain`. Over s steps just
    ⌊fraction · s · batch_size⌋ rows are old, and which rows of a batch is drawn for seed and step.
    Several earlier texts take turns. (Ratcliff 1990; experience replay.)

    Args:
        fraction: of the rows, on average over steps.
    """

    name = "replay"

    def __init__(self, *, fraction: Annotated[float, Gt(0), Lt(1)] = 0.1) -> None:
        self.fraction = Fraction(str(fraction))

    def batch(self, batch: Batch, step: int, rank: int, world_size: int) -> Batch:
        """The rank's rows, with old ones in their places."""
        share = len(batch["input_ids"])
        size = share * world_size
        first, stop = (math.floor(self.fraction * n * size) for n in (step, step + 1))
        seed = [self.trainer.config.seed, step]
        places = np.random.default_rng(seed).permutation(size)[: stop - first].tolist()
        changed = {key: value.clone() for key, value in batch.items()}
        for number, place in enumerate(places, start=first):
            if place // share != rank:
                continue
            for key, value in self.old_text.row(number).items():
                changed[key][place % share] = value[0]
        return changed


class Joint(_OldRows):
    """Trains on old and new text together: an upper bound of what can be kept and learned.

    Each step has all the rows of `plain`, and `old_rows` old ones for each of them, so it takes
    more tokens and time than `plain`: nothing that has the old text at hand should beat it.

    Args:
        old_rows: old rows for each new one.
    """

    name = "joint"

    def __init__(self, *, old_rows: PositiveInt = 1) -> None:
        self.old_rows = old_rows

    def batch(self, batch: Batch, step: int, rank: int, world_size: int) -> Batch:
        """The rank's rows, each followed by old ones."""
        share = len(batch["input_ids"])
        first = (step * share * world_size + rank * share) * self.old_rows
        old = [self.old_text.row(first + n) for n in range(share * self.old_rows)]
        return stack([batch, *old])


class ContinueOnBase(_OldRows):
    """Goes on with the text of pretraining in place of the new: a control.

    What changes here has nothing to do with a new domain, but with a schedule that warms up
    again. Rows follow those that the first run ended with; the new text is only evaluated on.
    """

    name = "continue-on-base"

    def batch(self, batch: Batch, step: int, rank: int, world_size: int) -> Batch:
        """The rank's rows of the first run's text."""
        share = len(batch["input_ids"])
        first = step * share * world_size + rank * share
        return stack([self.old_text.first_text_row(first + n) for n in range(share)])
