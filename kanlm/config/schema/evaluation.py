"""Settings of what is measured, sampled and recorded."""

from dataclasses import dataclass, field
from typing import Literal

from kanlm.config.schema.data import DataSettings
from kanlm.config.schema.types import NonNegativeFloat, PositiveInt


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Full passes over held-out text with a sliding window."""

    #: Tokens the window moves by; each token is scored once. Null is context_length.
    stride: PositiveInt | None = None
    #: Windows in one forward pass.
    batch_size: PositiveInt = 32
    #: Split of the figures that a study reports. Training validates on `validation`.
    split: Literal["validation", "test"] = "test"
    #: Domains evaluated beside the one trained on.
    domains: list[DataSettings] = field(default_factory=list)
    #: Resamples of the bootstrap interval.
    bootstrap_resamples: PositiveInt = 1000

    def __post_init__(self) -> None:
        for i, data in enumerate(self.domains):
            if not data.sources:
                raise ValueError(f"domains.{i}.sources is missing: name the text to evaluate on")


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """Samples: what the model is asked to continue, and how tokens are drawn."""

    #: Text to continue; empty starts a document.
    prompt: str = ""
    #: Tokens added to the prompt, at most: the end of the document ends a sample.
    max_new_tokens: PositiveInt = 120
    #: Logits are divided by it before a token is drawn: below 1 samples are less varied.
    #: 0 is greedy: the likeliest token each time.
    temperature: NonNegativeFloat = 0.8
    #: Most probable tokens that one is drawn from.
    top_k: PositiveInt = 50


@dataclass(frozen=True, kw_only=True)
class TrackingSettings:
    """Weights & Biases. `metrics.jsonl` is always written."""

    #: `offline` records the run in its folder, `online` sends it as it goes.
    wandb: Literal["offline", "online", "disabled"] = "offline"
    #: wandb project.
    project: str = "kanlm"
