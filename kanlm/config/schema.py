"""Every setting of kanlm: frozen dataclasses that refuse what is impossible.

The options of feed-forward kinds, bases and sources are the keyword arguments of their
classes, and so are not here: sections that hold them are dictionaries, checked by
`checking.check_options` when a configuration is resolved.
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from kanlm.config.arms import check_arm, check_grid, check_stage
from kanlm.config.weights import mixture_stages, weight_schedule
from kanlm.errors import nearest
from kanlm.model.settings import ModelSettings

#: Of an arm: more would take years, and their list alone all memory.
MOST_TRIALS = 10_000

#: Seeds there are: numpy's generators take no more than 32 bits.
SEEDS = 2**32


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """How text becomes tokens. Fine-tuning inherits the base run's."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    #: `bytes`, the `characters` of the training text, byte-level `bpe` trained on it, or a
    #: `pretrained` one.
    kind: Literal["bytes", "characters", "bpe", "pretrained"] = "bpe"
    #: Tokens of a BPE trained here, the end-of-document token included.
    vocab_size: int | None = None
    #: Folder, file or hub name of a pretrained tokenizer.
    name: str | None = None

    def __post_init__(self) -> None:
        if (self.kind == "bpe") != (self.vocab_size is not None):
            raise ValueError(
                "vocab_size belongs to kind bpe, and bpe needs it: "
                f"kind = {self.kind}, vocab_size = {self.vocab_size}"
            )
        if self.vocab_size is not None and self.vocab_size < 257:
            raise ValueError(
                f"vocab_size = {self.vocab_size}: expected at least 257 "
                "(256 bytes and the end of a document)"
            )
        if (self.kind == "pretrained") != (self.name is not None):
            raise ValueError(
                "name belongs to kind pretrained, and pretrained needs it: "
                f"kind = {self.kind}, name = {self.name}"
            )


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """One domain of text: a mixture of sources, split and tokenised into shards."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    #: Name of the domain in results.
    domain: str = "text"
    #: Each `{kind, weight, …}`; the rest are the options of the source's class. The weight is
    #: its share of the training sequences beside the others', a number or, by the update from
    #: which on it holds, several: `{0: 1.0, 5000: 0.25}`. Whatever reads text needs one.
    sources: list[dict[str, Any]] = field(default_factory=list)
    #: Folder against which a source's relative paths are read.
    root: str = "."
    #: Folder of tokenised shards.
    cache_dir: str = "data/cache"
    #: Share of the documents, by the hash of their text, held out for validation.
    validation_fraction: float = 0.05
    #: Share of the documents held out for the figures that are reported.
    test_fraction: float = 0.05
    #: Drop a training document whose 8-token shingles have at least this Jaccard
    #: similarity with a held-out document's; null keeps all.
    near_duplicate_threshold: float | None = 0.8
    #: Attend only to tokens of the same document.
    attention_within_documents: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction = {self.validation_fraction}: expected between 0 and 1"
            )
        if not 0 <= self.test_fraction < 1 - self.validation_fraction:
            raise ValueError(
                f"test_fraction = {self.test_fraction} and validation_fraction = "
                f"{self.validation_fraction} leave nothing to train on"
            )
        if self.near_duplicate_threshold is not None and not 0 < self.near_duplicate_threshold <= 1:
            raise ValueError(
                f"near_duplicate_threshold = {self.near_duplicate_threshold}: "
                "expected 0 < threshold ≤ 1, or null"
            )
        if not self.domain or set(self.domain) & set("/\\:") or self.domain.startswith("."):
            raise ValueError(f"domain = {self.domain!r}: expected a name fit for a folder")
        mixture_stages(self.weights)

    @property
    def weights(self) -> list[dict[int, float]]:
        """Of each source, update → weight from that one on.

        Raises:
            ValueError: naming the source whose weight is none.
        """
        schedules = []
        for i, source in enumerate(self.sources):
            weight = source.get("weight", 1.0)
            try:
                schedules.append(weight_schedule(weight))
            except ValueError as error:
                raise ValueError(f"sources.{i}.weight = {weight!r}: {error}") from None
        return schedules


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """The loop: how long, how much at a time, in which precision."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    #: Updates.
    steps: int = 1000
    #: Sequences in a step, over all processes.
    batch_size: int = 16
    #: Sequences in one forward pass of one process; null takes its whole share.
    micro_batch_size: int | None = None
    #: Of matrix products: `bf16` by autocast, with weights and optimizer in float32.
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    #: Multiply float32 on a GPU as TF32, whose products have 10 bits behind the point in place
    #: of 23, several times faster. Null is what torch was set to, off unless a program asked.
    tf32: bool | None = None
    #: Take operators that give the same bits every time, where torch has a choice. On a CPU
    #: resumed and repeated runs are equal to the last bit without it; on a GPU only with it,
    #: on GPUs of one kind with as many processes and the same versions. It costs speed, and
    #: operators that cannot raise an error.
    deterministic: bool = False
    #: `auto` compiles where a GPU and a C compiler are, and says what it chose; `regional`
    #: compiles a decoder block at a time, which takes a fraction of the time for deep models.
    #: With sharding, `on` and `auto` are regional, too.
    compile: Literal["off", "on", "regional", "auto"] = "auto"
    #: Keep the inputs of decoder blocks alone, and compute the blocks again in backward.
    activation_checkpointing: bool = False
    #: What several processes share: `none` keeps the whole model in each (DDP), `full` gives
    #: each a part of parameters, gradients and optimizer state (FSDP2), and `hybrid` does so
    #: within a machine and keeps a copy in each machine. One process holds everything.
    sharding: Literal["none", "full", "hybrid"] = "none"
    #: Largest norm of the gradient; null does not clip.
    gradient_clip: float | None = 1.0
    #: Steps between log lines.
    log_every: int = 10
    #: Steps between full validation passes; null validates at the end alone.
    evaluate_every: int | None = 250
    #: Steps between samples; null draws one at the end alone.
    sample_every: int | None = None
    #: Steps between checkpoints; null saves at the end alone.
    checkpoint_every: int | None = 500
    #: Checkpoints kept: the newest ones.
    keep_checkpoints: int = 2
    #: Write checkpoints while training goes on, from a copy in the host's memory: `auto` does
    #: where the model is on a GPU.
    background_checkpoints: Literal["off", "on", "auto"] = "auto"
    #: Also save, and keep, a checkpoint of the least validation loss, as early stopping does.
    keep_best_checkpoint: bool = False
    #: Stop after this many validations without a new best, and keep the best model.
    early_stopping_patience: int | None = None
    #: Minutes after which a run saves itself and exits with code 75; another start has as
    #: many again. It may differ from start to start.
    time_limit_minutes: float | None = None
    #: Steps in a row that may be left out, for a loss or gradient that is not finite or for
    #: a spike, before the run gives up.
    max_skipped_steps: int = 10
    #: A loss that is this many standard deviations above those of up to 128 steps before is
    #: noted as a spike; null looks for none.
    loss_spike_deviations: float | None = 6.0
    #: Leave the step of a spike out.
    skip_loss_spikes: bool = False
    #: Iterations of L-BFGS over the basis coefficients alone, on one fixed batch after the
    #: last step; 0 leaves them as training did. Validation is logged before and after.
    polish_steps: int = 0
    #: Sequences in that batch, the next after those trained on; null is batch_size.
    polish_batch_size: int | None = None
    #: Cells of the splines' grids, by the update before which they are refined to so many:
    #: `{0: 4, 1000: 8}`. It overrides `grid_size`; twins are matched at the last.
    grid_schedule: dict[int, int] | None = None
    #: Updates before which every grid moves to where its layer's inputs are.
    grid_adaptation_steps: list[int] = field(default_factory=list)
    #: Of a grid that has moved: 1 for equal cells, 0 for cells that hold equally many inputs.
    #: Less than 1 needs a basis with `equal_cells: false`.
    grid_uniform_share: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, "steps", "batch_size", "micro_batch_size", "gradient_clip", "log_every")
        _positive(self, "evaluate_every", "sample_every", "checkpoint_every", "keep_checkpoints")
        _positive(self, "early_stopping_patience", "polish_batch_size", "time_limit_minutes")
        _positive(self, "max_skipped_steps", "loss_spike_deviations")
        if self.skip_loss_spikes and self.loss_spike_deviations is None:
            raise ValueError("skip_loss_spikes needs loss_spike_deviations")
        if self.keep_best_checkpoint and self.evaluate_every is None:
            raise ValueError("keep_best_checkpoint needs evaluate_every")
        if self.early_stopping_patience is not None and self.evaluate_every is None:
            raise ValueError("early_stopping_patience needs evaluate_every")
        self._check_polish()
        self._check_grids()

    def _check_grids(self) -> None:
        if not 0 <= self.grid_uniform_share <= 1:
            raise ValueError(
                f"grid_uniform_share = {self.grid_uniform_share}: expected between 0 and 1"
            )
        for step in [*(self.grid_schedule or ()), *self.grid_adaptation_steps]:
            if not 0 <= step < self.steps:
                raise ValueError(
                    f"grids change before update {step}, and there are updates 0 to "
                    f"{self.steps - 1}"
                )
        if self.grid_schedule is None:
            return
        if 0 not in self.grid_schedule:
            raise ValueError(
                f"grid_schedule = {self.grid_schedule}: expected an entry for step 0, the start"
            )
        sizes = [self.grid_schedule[step] for step in sorted(self.grid_schedule)]
        for coarse, fine in zip([1, *sizes], sizes, strict=False):
            if fine < 1 or fine % coarse:
                raise ValueError(
                    f"grid_schedule = {self.grid_schedule}: expected each size to be a multiple "
                    "of the one before, so that no function changes"
                )

    def _check_polish(self) -> None:
        if self.polish_steps < 0:
            raise ValueError(f"polish_steps = {self.polish_steps}: expected 0 or more")
        if self.polish_steps == 0 and self.polish_batch_size is not None:
            raise ValueError(
                f"polish_batch_size = {self.polish_batch_size} needs polish_steps above 0"
            )
        if self.polish_steps and self.early_stopping_patience is not None:
            raise ValueError(
                f"polish_steps = {self.polish_steps}: early stopping keeps the best model, not "
                "the last, which is what is polished; set early_stopping_patience to null"
            )
        if self.polish_batch_size is not None and self.polish_batch_size % self.batch_size:
            raise ValueError(
                f"polish_batch_size = {self.polish_batch_size}: expected a multiple of "
                f"batch_size = {self.batch_size}"
            )


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW for all, or Muon for hidden matrices and AdamW for the rest."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    #: `muon` updates hidden matrices by Muon, and the rest by AdamW.
    kind: Literal["adamw", "muon"] = "adamw"
    #: Peak rate, at the end of the warm-up.
    learning_rate: float = 6e-3
    #: Decoupled decay of matrices; gains, biases and what bases own are not decayed.
    weight_decay: float = 0.1
    #: Rate of basis coefficients over that of other weights.
    coefficients_learning_rate_ratio: float = 1.0
    #: Decoupled decay of basis coefficients.
    coefficients_weight_decay: float = 0.1
    #: Rate over `learning_rate` of parameters inside bases, which are never decayed: scales
    #: of wavelets, denominators of rationals, weights of implicit functions.
    basis_learning_rate_ratio: float = 1.0
    #: AdamW's decay rates of its first and second moments.
    betas: tuple[float, float] = (0.9, 0.95)
    #: Added to the root of AdamW's second moment.
    epsilon: float = 1e-8
    #: Peak rate of what Muon updates, by steps as large as AdamW's; null is learning_rate.
    muon_learning_rate: float | None = None
    #: Give Muon the coefficients of layers whose edges own their functions, too, as the
    #: (in · B, out) matrix that they are.
    muon_coefficients: bool = False

    def __post_init__(self) -> None:
        _positive(self, "learning_rate", "coefficients_learning_rate_ratio", "epsilon")
        _positive(self, "basis_learning_rate_ratio", "muon_learning_rate")
        for name in ("weight_decay", "coefficients_weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)}: expected 0 or more")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas = {list(self.betas)}: expected each 0 ≤ beta < 1")
        if self.kind != "muon":
            for name, unset in (("muon_learning_rate", None), ("muon_coefficients", False)):
                if getattr(self, name) != unset:
                    raise ValueError(
                        f"{name} = {getattr(self, name)} belongs to kind muon: kind = {self.kind}"
                    )


@dataclass(frozen=True, kw_only=True)
class PenaltySettings:
    """Weights of what is added to the loss for the coefficients of KAN layers; 0 is nothing.

    Sums over all edges, so that what suits one width is too much for a wider model. The
    logged `loss` stays the language model's, and `penalty` stands beside it.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    #: Mean |c| of an edge (KAN paper, eq. 2.18).
    l1: float = 0.0
    #: Entropy of the edges' shares in it (eq. 2.19): few edges rather than many.
    entropy: float = 0.0
    #: Squared second differences of the coefficients of splines and RBFs.
    smoothness: float = 0.0
    #: Exact ∫ f″² of splines of degree 2 or more.
    curvature: float = 0.0
    #: Squared coefficients.
    l2: float = 0.0

    def __post_init__(self) -> None:
        for name, weight in vars(self).items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name} = {weight}: expected 0 or more")

    @property
    def weights(self) -> dict[str, float]:
        """Those that are not 0, by name."""
        return {name: weight for name, weight in vars(self).items() if weight}


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """The learning rate over steps, as a fraction of the peak."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    #: How the rate falls from its peak, after the warm-up.
    kind: Literal["cosine", "warmup-stable-decay", "constant"] = "cosine"
    #: Steps of linear warm-up. `auto` is 50, or a tenth of training.steps where that is less;
    #: a run's config.yaml states the number.
    warmup_steps: int | Literal["auto"] = "auto"
    #: Last part of the run over which warmup-stable-decay falls linearly.
    decay_fraction: float = 0.2
    #: Rate at the end, over the peak.
    final_ratio: float = 0.1

    def __post_init__(self) -> None:
        if self.warmup_steps != "auto" and self.warmup_steps < 0:
            raise ValueError(f"warmup_steps = {self.warmup_steps}: expected 0 or more")
        for name in ("decay_fraction", "final_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)}: expected between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Full passes over held-out text with a sliding window."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    #: Tokens the window moves by; each token is scored once. Null is context_length.
    stride: int | None = None
    #: Windows in one forward pass.
    batch_size: int = 32
    #: Split of the figures that a study reports. Training validates on `validation`.
    split: Literal["validation", "test"] = "test"
    #: Domains evaluated beside the one trained on.
    domains: list[DataSettings] = field(default_factory=list)
    #: Resamples of the bootstrap interval.
    bootstrap_resamples: int = 1000

    def __post_init__(self) -> None:
        _positive(self, "stride", "batch_size", "bootstrap_resamples")
        for i, data in enumerate(self.domains):
            if not data.sources:
                raise ValueError(f"domains.{i}.sources is missing: name the text to evaluate on")


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """Samples: what the model is asked to continue, and how tokens are drawn."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    #: Text to continue; empty starts a document.
    prompt: str = ""
    #: Tokens added to the prompt, at most: the end of the document ends a sample.
    max_new_tokens: int = 120
    #: Logits are divided by it before a token is drawn: below 1 samples are less varied.
    #: 0 is greedy: the likeliest token each time.
    temperature: float = 0.8
    #: Most probable tokens that one is drawn from.
    top_k: int = 50

    def __post_init__(self) -> None:
        _positive(self, "max_new_tokens", "top_k")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature = {self.temperature}: expected 0 (greedy) or more")


@dataclass(frozen=True, kw_only=True)
class TrackingSettings:
    """Weights & Biases. `metrics.jsonl` is always written."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    #: `offline` records the run in its folder, `online` sends it as it goes.
    wandb: Literal["offline", "online", "disabled"] = "offline"
    #: wandb project.
    project: str = "kanlm"


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """Arms × seeds × stages, for `kanlm compare` and `kanlm continual`."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    #: Name → partial configuration laid over this one. The first arm is the reference. What
    #: decides on which tokens an arm is trained and scored is the same for all.
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    #: Seeds of every arm: of initial weights and of the order of the text.
    seeds: list[int] = field(default_factory=lambda: [0])
    #: What the twins share with the first arm, or with an arm that has no width to solve:
    #: the feed-forward blocks' parameters or FLOPs. Arms that state `hidden` themselves are
    #: left alone.
    match: Literal["parameters", "flops"] = "parameters"
    #: Dotted setting → values tried by every arm with the first seed; those whose model has
    #: the least validation loss are kept for the other seeds. A trial may diverge.
    grid: dict[str, list[Any]] = field(default_factory=dict)
    #: Grids of single arms in place of `grid`, with equally many trials.
    arm_grids: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    #: How many arms go on to the other seeds: those of least validation loss with the first,
    #: the first arm always among them; null is all.
    finalists: int | None = None
    #: Partial configurations of the stages after pretraining, each naming `data.domain`.
    stages: list[dict[str, Any]] = field(default_factory=list)
    #: Command that starts a run, for example `accelerate launch --num_processes 8`;
    #: null runs each in one process.
    launcher: str | None = None
    #: Runs side by side, each with its part of the CPU threads. Their times are then those
    #: of a shared machine.
    parallel_runs: int = 1

    def __post_init__(self) -> None:
        if not self.arms:
            raise ValueError("arms is empty: name at least one")
        _positive(self, "parallel_runs", "finalists")
        for name in self.arms:
            if not name or set(name) & set("/\\:") or name.startswith("."):
                raise ValueError(f"arm {name!r}: expected a name fit for a folder")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds = {self.seeds}: expected at least one, none twice")
        if not all(0 <= seed < SEEDS for seed in self.seeds):
            raise ValueError(f"seeds = {self.seeds}: expected each 0 ≤ seed < 2**32")
        for name in self.arm_grids:
            if name not in self.arms:
                raise ValueError(f"arm_grids names '{name}'{nearest(name, self.arms)}")
        self._check_parts()

    def _check_parts(self) -> None:
        """Check that arms, trials and stages set only what is theirs to set."""
        for name, part in self.arms.items():
            check_arm(part, f"arms.{name}")
        for grid in (self.grid, *self.arm_grids.values()):
            trials = math.prod(len(values) for values in grid.values())
            if trials > MOST_TRIALS:
                raise ValueError(f"grid has {trials:,} trials: expected at most {MOST_TRIALS:,}")
        check_grid(self.grid, "grid")
        for name, grid in self.arm_grids.items():
            check_grid(grid, f"arm_grids.{name}")
        for i, part in enumerate(self.stages):
            check_stage(part, f"stages.{i}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """All of one run, or of the runs that a study makes from it."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    #: Of initial weights, data order, dropout and samples.
    seed: int = 0
    #: Folder of the run or study.
    output_dir: str = "runs/default"
    #: Run folder whose model and tokenizer fine-tuning starts from.
    initialize_from: str | None = None
    #: Cut model, batch and steps to next to nothing, to see that a config runs at all.
    shrink: bool = False
    data: DataSettings = field(default_factory=DataSettings)
    tokenizer: TokenizerSettings = field(
        default_factory=lambda: TokenizerSettings(kind="bpe", vocab_size=2048)
    )
    model: ModelSettings = field(default_factory=ModelSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    penalties: PenaltySettings = field(default_factory=PenaltySettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    study: StudySettings | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed < SEEDS:
            raise ValueError(f"seed = {self.seed}: expected 0 ≤ seed < 2**32")
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


def _positive(settings: Any, *names: str) -> None:
    """Raise ValueError unless each named setting is null or above 0."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} = {value}: expected a positive number")
