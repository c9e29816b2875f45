"""Settings of what is measured, sampled and recorded."""

from dataclasses import dataclass, field
from typing import Literal

from kanlm.config.schema.data import DataSettings
from kanlm.config.schema.types import NonNegativeFloat, PositiveInt


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Full passes over held-out text with a sliding window."""

    #: Tokens by which the window moves; every token is scored once. Null is context_length.
    stride: PositiveInt | None = None
    #: Windows in one forward pass.
    batch_size: PositiveInt = 32
    #: Split that results are reported on. Training always validates on `validation`.
    split: Literal["validation", "test"] = "test"
    #: Domains to evaluate in addition to the one trained on, each with the settings of `data`.
    domains: list[DataSettings] = field(default_factory=list)
    #: Number of resamples of the bootstrap intervals.
    bootstrap_resamples: PositiveInt = 1000

    def __post_init__(self) -> None:
        for i, data in enumerate(self.domains):
            if not data.sources:
                raise ValueError(f"domains.{i}.sources is missing: name the text to evaluate on")


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """Samples: what the model is asked to continue, and how tokens are drawn."""

    #: Text to continue; empty starts a new document.
    prompt: str = ""
    #: Largest number of tokens to generate; the end-of-document token ends a sample.
    max_new_tokens: PositiveInt = 120
    #: Logits are divided by it before a token is drawn; 0 is greedy decoding.
    temperature: NonNegativeFloat = 0.8
    #: Draw from this many most probable tokens.
    top_k: PositiveInt = 50


@dataclass(frozen=True, kw_only=True)
class TrackingSettings:
    """Weights & Biases. `metrics.jsonl` is always written."""

    #: `offline` records the run in its folder, `online` uploads it while it runs, `disabled`
    #: records nothing.
    wandb: Literal["offline", "online", "disabled"] = "offline"
    #: Project at Weights & Biases.
    project: str = "kanlm"
