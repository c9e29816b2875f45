"""What the loop must remember between steps, and a checkpoint between processes."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from kanlm.kan.kernels import TrainingBackend
from kanlm.training.metrics import Window
from kanlm.training.step import StepGuard


@dataclass
class TrainingState:
    """Counters and figures of a run, the same on all ranks."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    step: int = 0
    #: The callback whose `after_step` is next, where a stop came before all were called.
    pending: str | None = None
    tokens: int = 0
    #: Seconds in training steps and the polish: no evaluation, sampling, checkpoints or start.
    seconds: float = 0.0
    #: Of those, in compiling.
    compile_seconds: float = 0.0
    #: Nats per token of the last validation, and the least so far.
    last_loss: float | None = None
    best_loss: float | None = None
    best_step: int = 0
    stale_validations: int = 0
    wandb_id: str | None = None
    #: Backend of KAN layers' sums; empty until it is chosen.
    kan_backend: TrainingBackend | Literal[""] = ""
    #: Lines of metrics.jsonl.
    metrics_lines: int = 0
    #: As of the last reading of the accumulator.
    window: Window = field(default_factory=Window)
    guard: StepGuard = field(default_factory=StepGuard)
    #: Of the text trained on; a resumed run must have the same.
    tokens_hash: str = ""
    #: By callback, what it keeps apart from tensors.
    callbacks: dict[str, dict[str, Any]] = field(default_factory=dict)
