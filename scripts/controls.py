"""Does what should forget forget, and does what should keep keep?

Whoever measures forgetting must first see it where it is known to be, and not see it where it is
known to be absent. Peaks are learned one after another, each stage showing one region alone:

- five Gaussian peaks on [-1, 1] (Liu et al., arXiv 2404.19756, section 3.4; pykan's example of
  continual learning) by a KAN [1, 1] of 200 cubic cells. Without base function, bias and grid
  update every weight belongs to one place, and old peaks stay. With a SiLU beside the splines, or
  in an MLP of as many parameters, they do not.
- four peaks on a square by a KAN [2, 5, 1]. Regions share coordinates, and the second layer's
  inputs, so that being local in one dimension does not help: old peaks are lost (as in pykan's
  issue 227).

What an optimizer does to weights whose gradient is zero is measured, too: coefficients of
functions that are zero on all the points of a stage must not move in it. They stay under SGD,
L-BFGS and a fresh Adam, and are moved by the momentum of an Adam that is carried over from the
stage before, and by AdamW's decay.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from kanlm.evaluation import forgetting
from kanlm.experiments.provenance import environment
from kanlm.kan import BSpline, KANLinear
from kanlm.kan.layer import Base, Start

Optimizer = Literal["L-BFGS", "SGD", "Adam", "Adam, carried over", "AdamW"]

#: A control keeps what it learned if the error on old regions grows by less than this.
KEPT = 0.10
#: And loses it if the error grows to at least so many times.
LOST = 10.0
#: It has learned a region if the error is below this share of what predicting 0 leaves.
LEARNED = 0.1


# Tasks


@dataclass(frozen=True)
class Task:
    """A function that is learned region by region.

    Attributes:
        centres: (regions, dimensions) of the peaks, in the order of the stages.
        half_width: of the square region around each.
        sharpness: a in exp(−a |x − centre|²), of which the target is the sum.
        points: along each side of a region.
    """

    centres: tuple[tuple[float, ...], ...]
    half_width: float
    sharpness: float
    points: int

    def target(self, x: Tensor) -> Tensor:
        """(n, dimensions) → (n, 1)."""
        squares = (x.unsqueeze(1) - torch.tensor(self.centres)).square().sum(-1)
        return torch.exp(-self.sharpness * squares).sum(1, keepdim=True)

    def region(self, stage: int, positions: Tensor) -> Tensor:
        """A grid over a region, of positions on [-1, 1] along each side."""
        side = self.half_width * positions
        dimensions = len(self.centres[stage])
        grid = torch.cartesian_prod(*[side] * dimensions).reshape(-1, dimensions)
        return grid + torch.tensor(self.centres[stage])

    def seen(self, stage: int, seed: int) -> Tensor:
        """Points to learn from: one drawn in each of equal parts of every side."""
        generator = torch.Generator().manual_seed(1000 * seed + stage)
        parts = torch.arange(self.points) + torch.rand(self.points, generator=generator)
        return self.region(stage, 2 * parts / self.points - 1)

    def unseen(self, stage: int) -> Tensor:
        """Points to be measured on, between those."""
        count = 2 * self.points + 1
        return self.region(stage, (2 * torch.arange(count) + 1) / count - 1)


LINE = Task(((-0.8,), (-0.4,), (0.0,), (0.4,), (0.8,)), half_width=0.2, sharpness=300, points=100)
SQUARE = Task(
    ((-0.5, -0.5), (0.5, -0.5), (-0.5, 0.5), (0.5, 0.5)), half_width=0.5, sharpness=20, points=20
)


# Models


def kan(base: Base = None, start: Start = "zero") -> nn.Module:
    """KAN [1, 1], 203 coefficients, and the base's weight if there is one."""
    basis = BSpline(grid_size=200, degree=3, grid_range=(-1, 1))
    return KANLinear(1, 1, basis=basis, base=base, bias=False, gain=0.1, start=start)


def deep_kan() -> nn.Module:
    """KAN [2, 5, 1] without base and bias, 345 coefficients."""
    layer = partial(KANLinear, base=None, bias=False)
    return nn.Sequential(
        layer(2, 5, basis=BSpline(grid_size=20, degree=3, grid_range=(-1, 1))),
        layer(5, 1, basis=BSpline(grid_size=20, degree=3, grid_range=(-2, 2))),
    )


def mlp(inputs: int, hidden: int, steepness: float) -> nn.Module:
    """One tanh layer whose units turn at points spread over the range, as steeply as is needed.

    With torch's own start it learns no peak so narrow, and what is not learned is not forgotten.
    """
    first = nn.Linear(inputs, hidden)
    with torch.no_grad():
        first.weight.mul_(steepness)
        turning = 2 * torch.rand(hidden, inputs) - 1
        first.bias.copy_(-(first.weight * turning).sum(1))
    return nn.Sequential(first, nn.Tanh(), nn.Linear(hidden, 1))


# Controls


@dataclass(frozen=True)
class Control:
    """One model learning one task by one optimizer.

    Attributes:
        updates: in each stage.
        expected: what becomes of old regions; None where only the row is of interest.
        untouched: what becomes of coefficients without gradient; None where there are none, or
            where that is not asked.
    """

    name: str
    task: Task
    build: Callable[[], nn.Module]
    optimizer: Optimizer
    updates: int
    learning_rate: float = 0.02
    expected: Literal["kept", "lost"] | None = None
    untouched: Literal["still", "moved"] | None = None

    def start(self, model: nn.Module) -> torch.optim.Optimizer:
        """A new optimizer, as at the start of a stage."""
        parameters = model.parameters()
        match self.optimizer:
            case "L-BFGS":
                return torch.optim.LBFGS(
                    parameters,
                    max_iter=self.updates,
                    tolerance_grad=1e-12,
                    tolerance_change=1e-14,
                    line_search_fn="strong_wolfe",
                )
            case "SGD":
                return torch.optim.SGD(parameters, lr=self.learning_rate)
            case "AdamW":
                return torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=0.01)
            case _:
                return torch.optim.Adam(parameters, lr=self.learning_rate)


_MLP = partial(mlp, 1, 67, 30.0)
_DEEP_MLP = partial(mlp, 2, 86, 8.0)
CONTROLS = (
    Control("KAN [1, 1]", LINE, kan, "L-BFGS", 100, expected="kept", untouched="still"),
    Control("KAN [1, 1]", LINE, kan, "SGD", 300, 20.0, expected="kept", untouched="still"),
    Control("KAN [1, 1]", LINE, kan, "Adam", 100, expected="kept", untouched="still"),
    Control("KAN [1, 1]", LINE, kan, "Adam, carried over", 100, untouched="moved"),
    Control("KAN [1, 1]", LINE, kan, "AdamW", 100, untouched="moved"),
    Control("KAN [1, 1], random start", LINE, partial(kan, start="random"), "L-BFGS", 100),
    Control("KAN [1, 1] + SiLU", LINE, partial(kan, "silu"), "L-BFGS", 100, expected="lost"),
    Control("KAN [1, 1] + SiLU", LINE, partial(kan, "silu"), "Adam", 300, expected="lost"),
    Control("MLP [1, 67, 1]", LINE, _MLP, "L-BFGS", 300, expected="lost"),
    Control("MLP [1, 67, 1]", LINE, _MLP, "Adam", 1000, 0.01, expected="lost"),
    Control("KAN [2, 5, 1]", SQUARE, deep_kan, "L-BFGS", 200, expected="lost"),
    Control("KAN [2, 5, 1]", SQUARE, deep_kan, "Adam", 300),
    Control("MLP [2, 86, 1]", SQUARE, _DEEP_MLP, "L-BFGS", 200, expected="lost"),
)


@dataclass(frozen=True)
class Outcome:
    """What came of a control with one seed.

    Attributes:
        losses: (stages, regions) mean squared error on unseen points.
        joint: (regions,) the same after learning all regions at once, for as many updates.
        untouched: largest move, in any stage but the first, of a coefficient whose function was
            zero on all of the stage's points; None where there is none.
    """

    losses: list[list[float]]
    joint: list[float]
    untouched: float | None

    @property
    def matrix(self) -> np.ndarray:
        return np.array(self.losses)

    @property
    def learned(self) -> float:
        """Root mean squared error on old regions just after each was learned."""
        return math.sqrt(self.matrix.diagonal()[:-1].mean())

    @property
    def final(self) -> float:
        """The same after the last stage: the square of `learned` plus mean forgetting."""
        return math.sqrt(self.learned**2 + forgetting.forgetting(self.matrix).mean())

    @property
    def times(self) -> float:
        """How many times as large the error on old regions has become."""
        return self.final / self.learned


def measure(control: Control, seed: int, stages: int | None = None) -> Outcome:
    """Learn a control's regions one after another, and all at once.

    Args:
        control: what learns what.
        seed: of the weights and of the points.
        stages: how many of the regions; all by default.
    """
    task = control.task
    regions = range(len(task.centres))[:stages]
    model = _built(control, seed)
    optimizer = control.start(model)
    losses, moves = [], []
    for stage in regions:
        if stage and control.optimizer != "Adam, carried over":
            optimizer = control.start(model)
        x = task.seen(stage, seed)
        idle, before = _idle(model, x), _coefficients(model)
        _train(control, model, optimizer, x)
        if stage and idle is not None and before is not None:
            moves.append((_coefficients(model) - before)[idle].abs().max().item())
        losses.append([_error(task, model, region) for region in regions])
    joint = _built(control, seed)
    everything = torch.cat([task.seen(stage, seed) for stage in regions])
    for optimizer in [control.start(joint) for _ in regions]:
        _train(control, joint, optimizer, everything)
    return Outcome(losses, [_error(task, joint, r) for r in regions], max(moves) if moves else None)


def _built(control: Control, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return control.build()


def _train(control: Control, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    """The updates of one stage, on all its points at once."""
    y = control.task.target(x)

    def closure() -> Any:  # torch asks for a float and takes a tensor.
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    # One call of L-BFGS takes all its updates.
    for _ in range(1 if control.optimizer == "L-BFGS" else control.updates):
        optimizer.step(closure)


def _error(task: Task, model: nn.Module, region: int) -> float:
    x = task.unseen(region)
    with torch.no_grad():
        return (model(x) - task.target(x)).square().mean().item()


def _idle(model: nn.Module, x: Tensor) -> Tensor | None:
    """Which of a single layer's coefficients have functions that are zero on all points."""
    if not isinstance(model, KANLinear):
        return None
    with torch.no_grad():
        return (model.basis.values(x) == 0).all(0).unsqueeze(-1)


def _coefficients(model: nn.Module) -> Any:
    return model.coefficients.detach().clone() if isinstance(model, KANLinear) else None


# Judging


@dataclass(frozen=True)
class Row:
    """A control with what came of it for every seed."""

    control: Control
    outcomes: Sequence[Outcome]

    @property
    def faults(self) -> list[str]:
        """What is not as expected, in words."""
        control, outcomes = self.control, self.outcomes
        times = [outcome.times for outcome in outcomes]
        moves = [outcome.untouched or 0.0 for outcome in outcomes]
        regions = range(len(outcomes[0].losses))
        learned = LEARNED * math.sqrt(np.mean([_nothing(control.task, r) for r in regions]))
        found = []
        if control.expected and max(outcome.learned for outcome in outcomes) > learned:
            found.append(f"did not learn: an error above {LEARNED:.0%} of predicting 0")
        if control.expected == "kept" and max(times) >= 1 + KEPT:
            found.append(f"lost what it should keep: error × {max(times):.3g}")
        if control.expected == "lost" and min(times) < LOST:
            found.append(f"kept what it should lose: error × {min(times):.3g}")
        if control.untouched == "still" and max(moves) > 0:
            found.append(f"moved coefficients without gradient by {max(moves):.1e}")
        if control.untouched == "moved" and min(moves) == 0:
            found.append("did not move coefficients without gradient")
        return [f"{control.name}, {control.optimizer}: {fault}" for fault in found]


def _nothing(task: Task, region: int) -> float:
    """Mean squared error of predicting 0."""
    return task.target(task.unseen(region)).square().mean().item()


def report(rows: Sequence[Row], seeds: Sequence[int], seconds: float, made: dict[str, Any]) -> str:
    """What was learned and what was lost, in Markdown."""
    hardware, versions = made["hardware"], made["versions"]
    lines = []
    for row in rows:
        control, outcomes = row.control, row.outcomes
        moves = [outcome.untouched for outcome in outcomes if outcome.untouched is not None]
        asked = [
            {"kept": "keeps", "lost": "loses", None: ""}[control.expected],
            {"still": "idle stay", "moved": "idle move", None: ""}[control.untouched],
        ]
        lines.append(
            f"| {control.name} | {control.optimizer} | {len(outcomes[0].losses)} "
            f"| {_range(outcome.learned for outcome in outcomes)} "
            f"| {_range(outcome.final for outcome in outcomes)} "
            f"| {_range((outcome.times for outcome in outcomes), '.4g')} "
            f"| {_range(math.sqrt(np.mean(outcome.joint)) for outcome in outcomes)} "
            f"| {_range(moves) if moves else ''} "
            f"| {', '.join(filter(None, asked))}{' **not so**' if row.faults else ''} |"
        )
    faults = [f"- {fault}" for row in rows for fault in row.faults]
    dirty = " with changes" if made["dirty"] else ""
    return "\n".join(
        [
            "# Positive controls of forgetting",
            "",
            f"Written by `./scripts/controls` at commit {(made['commit'] or 'unknown')[:7]}{dirty} "
            f"in {seconds:.0f} s: {hardware['cpu']}, {hardware['cores']} cores, torch "
            f"{versions['torch']}, seeds {', '.join(map(str, seeds))}. "
            f"{len(rows)} controls, {len(faults)} not as expected.",
            "",
            "Gaussian peaks are learned one after another, each stage showing one region alone: "
            "five on a line, or four on a square. Errors are root mean squared errors on unseen "
            "points of the old regions (all but the last); a range is over seeds. A control keeps "
            f"if the error grows by less than {KEPT:.0%}, and loses if it grows to at least "
            f"{LOST:g} times. *Joint* is the error on all regions after learning them at once. "
            "*Idle move* is the largest, in a stage, of a coefficient that had no gradient in it.",
            "",
            "KANs on the line start at zero unless said. From a random start the error grows by "
            "more than that, all of it within three cells of a border, where functions cross "
            "it. In the square under Adam it grows to less than ten times: the error in the end "
            "is as large as under L-BFGS, but it was larger just after learning. Neither row is "
            "judged.",
            "",
            "| model | optimizer | stages | just learned | in the end | growth, × | joint "
            "| idle move | expected |",
            "|---|---|---|---|---|---|---|---|---|",
            *lines,
            *(["", "Not as expected:", "", *faults] if faults else []),
            "",
        ]
    )


def _range(numbers: Iterable[float], form: str = ".2g") -> str:
    """The least and the largest, or one of them where they look the same."""
    found = sorted(numbers)
    low, high = (f"{number:{form}}" for number in (found[0], found[-1]))
    return low if low == high else f"{low} to {high}"


def content(rows: Sequence[Row], seeds: Sequence[int], made: dict[str, Any]) -> dict[str, Any]:
    """Everything that was measured, as JSON holds it."""
    return {
        "seeds": list(seeds),
        "provenance": made,
        "controls": [
            {
                "model": row.control.name,
                "optimizer": row.control.optimizer,
                "updates_per_stage": row.control.updates,
                "learning_rate": row.control.learning_rate,
                "expected": row.control.expected,
                "expected_of_idle": row.control.untouched,
                "faults": row.faults,
                "squared_error_by_seed": [outcome.losses for outcome in row.outcomes],
                "joint_squared_error_by_seed": [outcome.joint for outcome in row.outcomes],
                "idle_move_by_seed": [outcome.untouched for outcome in row.outcomes],
            }
            for row in rows
        ],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="controls", description="Positive controls of forgetting, without any language."
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], metavar="SEED")
    parser.add_argument(
        "--stages", type=int, choices=range(2, 6), help="how many regions (default: all)"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).with_suffix(".md"),
        help="page to write, with a .json beside it (default scripts/controls.md)",
    )
    options = parser.parse_args(arguments)
    started = time.monotonic()
    made = environment()
    rows = []
    with ProcessPoolExecutor(
        options.jobs, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        pending = [
            [pool.submit(measure, control, seed, options.stages) for seed in options.seeds]
            for control in CONTROLS
        ]
        for control, futures in zip(CONTROLS, pending, strict=True):
            rows.append(Row(control, [future.result() for future in futures]))
            times = _range((outcome.times for outcome in rows[-1].outcomes), ".4g")
            print(f"{control.name}, {control.optimizer}: error × {times}", flush=True)
    seconds = time.monotonic() - started
    options.output.write_text(report(rows, options.seeds, seconds, made))
    text = json.dumps(content(rows, options.seeds, made), indent=1, allow_nan=False)
    options.output.with_suffix(".json").write_text(text + "\n")
    faults = [fault for row in rows for fault in row.faults]
    print(f"{options.output}: {len(rows)} controls, {len(faults)} not as expected")
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
