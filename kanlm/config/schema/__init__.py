"""Every setting of kanlm: frozen dataclasses that refuse what is impossible.

What a number may be stands in its type; what depends on several settings is checked after
construction. `config.checking.check` reads both, so that a configuration made in Python is
checked where it is resolved.

The options of feed-forward kinds, bases, sources and strategies are the keyword arguments of
their classes, and so are not here: sections that hold them are dictionaries, checked by
`config.checking.check_options` when a configuration is resolved.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from kanlm.config.schema.data import DataSettings, TokenizerSettings
from kanlm.config.schema.evaluation import EvaluationSettings, GenerationSettings, TrackingSettings
from kanlm.config.schema.study import StudySettings
from kanlm.config.schema.training import (
    OptimizerSettings,
    PenaltySettings,
    ScheduleSettings,
    TrainingSettings,
)
from kanlm.config.schema.types import Seed
from kanlm.model.settings import ModelSettings


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of one run, or of the runs that a study makes from it."""

    # Of the sections, too.
    __pydantic_config__: ClassVar = {"extra": "forbid", "allow_inf_nan": False}

    #: Seed of initial weights, data order, dropout and samples.
    seed: Seed = 0
    #: Folder of the run or study.
    output_dir: str = "runs/default"
    #: Run folder whose model and tokenizer fine-tuning starts from.
    initialize_from: str | None = None
    #: Cut model, batch and steps to a run of seconds, to see that a config works at all.
    shrink: bool = False
    data: DataSettings = field(default_factory=DataSettings)
    tokenizer: TokenizerSettings = field(
        default_factory=lambda: TokenizerSettings(kind="bpe", vocab_size=2048)
    )
    model: ModelSettings = field(default_factory=ModelSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    penalties: PenaltySettings = field(default_factory=PenaltySettings)
    #: `{kind, …}`, what fine-tuning does about forgetting; the rest are the options of the
    #: strategy's class. In a study it holds for the stages after the first.
    strategy: dict[str, Any] = field(default_factory=lambda: {"kind": "plain"})
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    study: StudySettings | None = None

    def __post_init__(self) -> None:
        stride, context = self.evaluation.stride, self.model.context_length
        if stride is not None and stride > context:
            raise ValueError(
                f"evaluation.stride = {stride} is longer than model.context_length = {context}: "
                "tokens between windows would go unscored"
            )
        for i, schedule in enumerate(self.data.weights):
            if max(schedule) >= self.training.steps:
                raise ValueError(
                    f"data.sources.{i}.weight = {schedule}: it changes before update "
                    f"{max(schedule)}, and there are updates 0 to {self.training.steps - 1}"
                )
        warmup = self.schedule.warmup_steps
        if warmup != "auto" and warmup > self.training.steps:
            raise ValueError(
                f"schedule.warmup_steps = {self.schedule.warmup_steps} is more than "
                f"training.steps = {self.training.steps}"
            )
        if self.training.grid_schedule is not None:
            if self.initialize_from is not None:
                raise ValueError(
                    "training.grid_schedule belongs to pretraining: fine-tuning keeps the grids "
                    "of its base run"
                )
            if self.optimizer.muon_coefficients:
                raise ValueError(
                    "training.grid_schedule maps AdamW's moments to the finer grid: set "
                    "optimizer.muon_coefficients to false"
                )
        if self.training.sharding != "none" and self.training.polish_steps:
            raise ValueError(
                f"training.polish_steps = {self.training.polish_steps}: L-BFGS needs whole "
                "parameters; set training.sharding to none"
            )
        micro, batch = self.training.micro_batch_size, self.training.batch_size
        if micro is not None and batch % micro:
            raise ValueError(
                f"training.micro_batch_size = {micro} does not divide training.batch_size = {batch}"
            )
