"""The losses of a study as one array with named axes."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kanlm.results.schema import Record

#: Axes of `Losses.values`, which are fields of a record.
AXES = ("arm", "seed", "strategy", "stage", "domain", "step")


@dataclass(frozen=True)
class Losses:
    """Bits per byte by arm, seed, strategy, stage, domain and step.

    Attributes:
        values: (arms, seeds, strategies, stages, domains, steps), NaN where nothing was
            measured.
        labels: axis → what stands along it, in the order of `values`. Stages and steps are
            ascending; arms, seeds, strategies and domains as they first came.
    """

    values: np.ndarray
    labels: dict[str, list[Any]]

    def select(self, **chosen: Any) -> np.ndarray:
        """The values at one label of each axis that is named, as in `select(arm="swiglu")`.

        Returns:
            The remaining axes, in their order.

        Raises:
            ValueError: no such axis, or nothing of that label on it.
        """
        index: list[Any] = [slice(None)] * len(AXES)
        for axis, label in chosen.items():
            if axis not in AXES:
                raise ValueError(f"axis {axis!r}: expected {', '.join(AXES)}")
            if label not in self.labels[axis]:
                raise ValueError(f"{axis} {label!r}: expected one of {self.labels[axis]}")
            index[AXES.index(axis)] = self.labels[axis].index(label)
        return self.values[tuple(index)]

    def at_stage_ends(self) -> np.ndarray:
        """The values at the last step at which anything was measured in a stage.

        A domain that was not measured at that step is NaN, even if it was at an earlier one.

        Returns:
            (arms, seeds, strategies, stages, domains).
        """
        measured = ~np.isnan(self.values).all(axis=AXES.index("domain"))
        steps = np.arange(len(self.labels["step"]))
        last = np.where(measured, steps, 0).max(axis=-1)[..., np.newaxis, np.newaxis]
        return np.take_along_axis(self.values, last, axis=-1)[..., 0]


def losses(records: Iterable[Record], *, domains: Sequence[str] | None = None) -> Losses:
    """Put records of one split into an array.

    Args:
        records: sums of nats and bytes over the held-out text of a domain.
        domains: in the order in which they should stand; those named here and in no record are
            NaN throughout. By default as they come.

    Raises:
        ValueError: records of several splits, two of one place, or of a domain that is not
            among `domains`.
    """
    records = list(records)
    if len({record.split for record in records}) > 1:
        raise ValueError("records of several splits cannot stand in one array")
    labels: dict[str, list[Any]] = {
        axis: list(dict.fromkeys(getattr(record, axis) for record in records)) for axis in AXES
    }
    labels["stage"].sort()
    labels["step"].sort()
    if domains is not None:
        unknown = set(labels["domain"]) - set(domains)
        if unknown:
            raise ValueError(f"records of {', '.join(sorted(unknown))}: expected {list(domains)}")
        labels["domain"] = list(domains)
    places = {axis: {label: i for i, label in enumerate(found)} for axis, found in labels.items()}
    values = np.full([len(labels[axis]) for axis in AXES], np.nan)
    for record in records:
        place = tuple(places[axis][getattr(record, axis)] for axis in AXES)
        if not math.isnan(values[place]):
            raise ValueError(f"two records of one place: {record.key}")
        values[place] = record.nats / record.bytes / math.log(2)
    return Losses(values, labels)
