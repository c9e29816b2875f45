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
    """The training loop: its length, batches, precision and checkpoints."""

    #: Number of optimizer steps.
    steps: PositiveInt = 1000
    #: Sequences in a step, summed over all ranks.
    batch_size: PositiveInt = 16
    #: Sequences in one forward pass of a rank; null takes the rank's whole share of the batch.
    micro_batch_size: PositiveInt | None = None
    #: Precision of matrix products. `bf16` uses autocast, with weights and optimizer in float32.
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    #: Multiply float32 matrices on a GPU as TF32: several times faster, with 10 bits of mantissa
    #: instead of 23. Null keeps torch's setting, which is off by default.
    tf32: bool | None = None
    #: Use deterministic algorithms where torch has a choice. On a CPU, resumed and repeated runs
    #: are bitwise equal without it; on a GPU only with it, and only on the same kind of GPU with
    #: the same number of ranks and the same versions. It costs speed, and operators without a
    #: deterministic version raise an error.
    deterministic: bool = False
    #: Whether to use torch.compile. `auto` compiles if there is a GPU and a C compiler, and prints
    #: its choice; `regional` compiles one decoder block at a time, which takes a fraction of the
    #: time for deep models. With sharding, `on` and `auto` are regional, too.
    compile: Literal["off", "on", "regional", "auto"] = "auto"
    #: Backend of KAN layers' sums. `auto` times those that could serve before the first step, and
    #: keeps the fastest in checkpoints: `recompute` (C++ inside the products on a CPU, torch's
    #: products on a GPU) and `torch` on a CPU, `recompute` and `triton` on a GPU. They differ by
    #: rounding: name one for runs that are repeated to the bit. `reference` is the formula in
    #: plain torch. Layers that cannot take a backend take the next plainer one.
    kan_backend: Literal["auto", "recompute", "torch", "triton", "reference"] = "auto"
    #: Keep only the inputs of decoder blocks, and recompute the blocks in the backward pass.
    activation_checkpointing: bool = False
    #: `none` replicates the model on every rank (DDP); `full` shards parameters, gradients and
    #: optimizer state over all ranks (FSDP2); `hybrid` shards within a machine and replicates
    #: across machines. With one rank nothing is sharded.
    sharding: Literal["none", "full", "hybrid"] = "none"
    #: Largest norm of the gradient; null does not clip.
    gradient_clip: PositiveFloat | None = 1.0
    #: Steps between log lines.
    log_every: PositiveInt = 10
    #: Steps between full validation passes; null validates only at the end.
    evaluate_every: PositiveInt | None = 250
    #: Steps between samples; null draws one only at the end.
    sample_every: PositiveInt | None = None
    #: Steps between checkpoints; null saves only at the end.
    checkpoint_every: PositiveInt | None = 500
    #: Number of checkpoints that are kept, the newest ones.
    keep_checkpoints: PositiveInt = 2
    #: Write checkpoints while training continues, from a copy in the host's memory. `auto` does so
    #: if the model is on a GPU.
    background_checkpoints: Literal["off", "on", "auto"] = "auto"
    #: Also keep the checkpoint with the lowest validation loss, as early stopping does.
    keep_best_checkpoint: bool = False
    #: Stop after this many validations without a new best, and keep the best model; null never
    #: stops early.
    early_stopping_patience: PositiveInt | None = None
    #: Minutes after which a run saves a checkpoint and exits with code 75; null has no limit. It
    #: counts from each start anew, and may differ between starts.
    time_limit_minutes: PositiveFloat | None = None
    #: Consecutive steps that may be skipped, because of a non-finite loss or gradient or a loss
    #: spike, before the run gives up.
    max_skipped_steps: PositiveInt = 10
    #: Log a loss as a spike if it is this many standard deviations above the mean of up to 128
    #: steps before; null does not look for spikes.
    loss_spike_deviations: PositiveFloat | None = 6.0
    #: Skip the step of a loss spike.
    skip_loss_spikes: bool = False
    #: Iterations of L-BFGS on the basis coefficients only, on one fixed batch after the last step;
    #: 0 does none. Validation is logged before and after.
    polish_steps: NonNegativeInt = 0
    #: Sequences in the batch of L-BFGS, which follow those trained on; null is batch_size.
    polish_batch_size: PositiveInt | None = None
    #: Grid size of splines by the step before which grids are refined to it: `{0: 4, 1000: 8}`. It
    #: overrides the basis's `grid_size`; twins are matched at the last size.
    grid_schedule: dict[NonNegativeInt, PositiveInt] | None = None
    #: Steps before which every grid is moved to the range of its layer's inputs.
    grid_adaptation_steps: list[NonNegativeInt] = field(default_factory=list)
    #: How uniform an adapted grid is: 1 for equal cells, 0 for cells that hold equally many inputs.
    #: Values below 1 need a basis with `equal_cells: false`.
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
    #: Peak learning rate, reached at the end of the warm-up.
    learning_rate: PositiveFloat = 6e-3
    #: Decoupled weight decay of matrices; norm gains, biases and parameters inside bases are not
    #: decayed.
    weight_decay: NonNegativeFloat = 0.1
    #: Learning rate of basis coefficients relative to that of other weights.
    coefficients_learning_rate_ratio: PositiveFloat = 1.0
    #: Decoupled weight decay of basis coefficients.
    coefficients_weight_decay: NonNegativeFloat = 0.1
    #: Learning rate of parameters inside bases relative to `learning_rate`: scales of wavelets,
    #: denominators of rationals, weights of implicit functions. They are never decayed.
    basis_learning_rate_ratio: PositiveFloat = 1.0
    #: Decay rates of the first and second moments of AdamW.
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    #: Added to the square root of AdamW's second moment.
    epsilon: PositiveFloat = 1e-8
    #: Peak learning rate of weights that Muon updates, scaled so that its updates are as large as
    #: those of AdamW; null is learning_rate.
    muon_learning_rate: PositiveFloat | None = None
    #: Also let Muon update the basis coefficients of KAN layers, as the (in · B, out) matrix that
    #: they form.
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
    """Penalties on the coefficients of KAN layers, added to the loss; 0 adds nothing.

    They are summed over all edges, so that a weight that suits one width is too large for a wider
    model. The logged `loss` is that of the language model, and `penalty` is logged separately.
    """

    #: Weight of the mean |c| of each edge, summed over edges (KAN paper, eq. 2.18).
    l1: NonNegativeFloat = 0.0
    #: Weight of the entropy of the edges' shares of the L1 norm (eq. 2.19), which favours few
    #: edges.
    entropy: NonNegativeFloat = 0.0
    #: Weight of the squared second differences of the coefficients of splines and RBFs.
    smoothness: NonNegativeFloat = 0.0
    #: Weight of the exact ∫ f″² of splines of degree 2 or more.
    curvature: NonNegativeFloat = 0.0
    #: Weight of the squared coefficients.
    l2: NonNegativeFloat = 0.0

    @property
    def weights(self) -> dict[str, float]:
        """The weights that are not 0, by name."""
        return {name: weight for name, weight in vars(self).items() if weight}


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """The learning rate over steps, as a fraction of the peak."""

    #: How the rate falls from its peak, after the warm-up.
    kind: Literal["cosine", "warmup-stable-decay", "constant"] = "cosine"
    #: Steps of linear warm-up. `auto` is 50, or a tenth of training.steps if that is less; a run's
    #: config.yaml states the number.
    warmup_steps: NonNegativeInt | Literal["auto"] = "auto"
    #: Share of the run, at its end, over which warmup-stable-decay decays linearly.
    decay_fraction: Fraction = 0.2
    #: Learning rate at the end relative to the peak.
    final_ratio: Fraction = 0.1
