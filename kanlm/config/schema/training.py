"""Settings of the loop, the optimizer and its schedule."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Lt

from kanlm.config.schema.types import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

Beta = Annotated[float, Ge(0), Lt(1)]


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """The loop: how long, how much at a time, in which precision."""

    #: Updates.
    steps: PositiveInt = 1000
    #: Sequences in a step, over all processes.
    batch_size: PositiveInt = 16
    #: Sequences in one forward pass of one process; null takes its whole share.
    micro_batch_size: PositiveInt | None = None
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
    gradient_clip: PositiveFloat | None = 1.0
    #: Steps between log lines.
    log_every: PositiveInt = 10
    #: Steps between full validation passes; null validates at the end alone.
    evaluate_every: PositiveInt | None = 250
    #: Steps between samples; null draws one at the end alone.
    sample_every: PositiveInt | None = None
    #: Steps between checkpoints; null saves at the end alone.
    checkpoint_every: PositiveInt | None = 500
    #: Checkpoints kept: the newest ones.
    keep_checkpoints: PositiveInt = 2
    #: Write checkpoints while training goes on, from a copy in the host's memory: `auto` does
    #: where the model is on a GPU.
    background_checkpoints: Literal["off", "on", "auto"] = "auto"
    #: Also save, and keep, a checkpoint of the least validation loss, as early stopping does.
    keep_best_checkpoint: bool = False
    #: Stop after this many validations without a new best, and keep the best model.
    early_stopping_patience: PositiveInt | None = None
    #: Minutes after which a run saves itself and exits with code 75; another start has as
    #: many again. It may differ from start to start.
    time_limit_minutes: PositiveFloat | None = None
    #: Steps in a row that may be left out, for a loss or gradient that is not finite or for
    #: a spike, before the run gives up.
    max_skipped_steps: PositiveInt = 10
    #: A loss that is this many standard deviations above those of up to 128 steps before is
    #: noted as a spike; null looks for none.
    loss_spike_deviations: PositiveFloat | None = 6.0
    #: Leave the step of a spike out.
    skip_loss_spikes: bool = False
    #: Iterations of L-BFGS over the basis coefficients alone, on one fixed batch after the
    #: last step; 0 leaves them as training did. Validation is logged before and after.
    polish_steps: NonNegativeInt = 0
    #: Sequences in that batch, the next after those trained on; null is batch_size.
    polish_batch_size: PositiveInt | None = None
    #: Cells of the splines' grids, by the update before which they are refined to so many:
    #: `{0: 4, 1000: 8}`. It overrides `grid_size`; twins are matched at the last.
    grid_schedule: dict[NonNegativeInt, PositiveInt] | None = None
    #: Updates before which every grid moves to where its layer's inputs are.
    grid_adaptation_steps: list[NonNegativeInt] = field(default_factory=list)
    #: Of a grid that has moved: 1 for equal cells, 0 for cells that hold equally many inputs.
    #: Less than 1 needs a basis with `equal_cells: false`.
    grid_uniform_share: Fraction = 1.0

    def __post_init__(self) -> None:
        if self.skip_loss_spikes and self.loss_spike_deviations is None:
            raise ValueError("skip_loss_spikes needs loss_spike_deviations")
        if self.keep_best_checkpoint and self.evaluate_every is None:
            raise ValueError("keep_best_checkpoint needs evaluate_every")
        if self.early_stopping_patience is not None and self.evaluate_every is None:
            raise ValueError("early_stopping_patience needs evaluate_every")
        self._check_polish()
        self._check_grids()

    def _check_grids(self) -> None:
        for step in [*(self.grid_schedule or ()), *self.grid_adaptation_steps]:
            if step >= self.steps:
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
            if fine % coarse:
                raise ValueError(
                    f"grid_schedule = {self.grid_schedule}: expected each size to be a multiple "
                    "of the one before, so that no function changes"
                )

    def _check_polish(self) -> None:
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

    #: `muon` updates hidden matrices by Muon, and the rest by AdamW.
    kind: Literal["adamw", "muon"] = "adamw"
    #: Peak rate, at the end of the warm-up.
    learning_rate: PositiveFloat = 6e-3
    #: Decoupled decay of matrices; gains, biases and what bases own are not decayed.
    weight_decay: NonNegativeFloat = 0.1
    #: Rate of basis coefficients over that of other weights.
    coefficients_learning_rate_ratio: PositiveFloat = 1.0
    #: Decoupled decay of basis coefficients.
    coefficients_weight_decay: NonNegativeFloat = 0.1
    #: Rate over `learning_rate` of parameters inside bases, which are never decayed: scales
    #: of wavelets, denominators of rationals, weights of implicit functions.
    basis_learning_rate_ratio: PositiveFloat = 1.0
    #: AdamW's decay rates of its first and second moments.
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    #: Added to the root of AdamW's second moment.
    epsilon: PositiveFloat = 1e-8
    #: Peak rate of what Muon updates, by steps as large as AdamW's; null is learning_rate.
    muon_learning_rate: PositiveFloat | None = None
    #: Give Muon the coefficients of layers whose edges own their functions, too, as the
    #: (in · B, out) matrix that they are.
    muon_coefficients: bool = False

    def __post_init__(self) -> None:
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

    #: Mean |c| of an edge (KAN paper, eq. 2.18).
    l1: NonNegativeFloat = 0.0
    #: Entropy of the edges' shares in it (eq. 2.19): few edges rather than many.
    entropy: NonNegativeFloat = 0.0
    #: Squared second differences of the coefficients of splines and RBFs.
    smoothness: NonNegativeFloat = 0.0
    #: Exact ∫ f″² of splines of degree 2 or more.
    curvature: NonNegativeFloat = 0.0
    #: Squared coefficients.
    l2: NonNegativeFloat = 0.0

    @property
    def weights(self) -> dict[str, float]:
        """Those that are not 0, by name."""
        return {name: weight for name, weight in vars(self).items() if weight}


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """The learning rate over steps, as a fraction of the peak."""

    #: How the rate falls from its peak, after the warm-up.
    kind: Literal["cosine", "warmup-stable-decay", "constant"] = "cosine"
    #: Steps of linear warm-up. `auto` is 50, or a tenth of training.steps where that is less;
    #: a run's config.yaml states the number.
    warmup_steps: NonNegativeInt | Literal["auto"] = "auto"
    #: Last part of the run over which warmup-stable-decay falls linearly.
    decay_fraction: Fraction = 0.2
    #: Rate at the end, over the peak.
    final_ratio: Fraction = 0.1
