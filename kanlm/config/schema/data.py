"""Settings of the text and its tokenizer."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from kanlm.config.schema.mixture import mixture_stages, weight_schedule


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """How text becomes tokens. Fine-tuning inherits the base run's."""

    #: `bytes`, the `characters` of the training text, byte-level `bpe` trained on it, or a
    #: `pretrained` one.
    kind: Literal["bytes", "characters", "bpe", "pretrained"] = "bpe"
    #: Vocabulary of a BPE trained here: 256 bytes, the end-of-document token, and merges.
    vocab_size: Annotated[int, Ge(257)] | None = None
    #: Folder, file or hub name of a pretrained tokenizer.
    name: str | None = None

    def __post_init__(self) -> None:
        if (self.kind == "bpe") != (self.vocab_size is not None):
            raise ValueError(
                "vocab_size belongs to kind bpe, and bpe needs it: "
                f"kind = {self.kind}, vocab_size = {self.vocab_size}"
            )
        if (self.kind == "pretrained") != (self.name is not None):
            raise ValueError(
                "name belongs to kind pretrained, and pretrained needs it: "
                f"kind = {self.kind}, name = {self.name}"
            )


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """One domain of text: a mixture of sources, split and tokenised into shards."""

    #: Name of the domain in results.
    domain: str = "text"
    #: Entries `{kind, weight, …}`, whose other settings are the options of the kind. The weight is
    #: the source's share of the training sequences relative to the others': a number, or numbers by
    #: the step from which on they hold, `{0: 1.0, 5000: 0.25}`. A command that reads text needs at
    #: least one source.
    sources: list[dict[str, Any]] = field(default_factory=list)
    #: Folder that a source's relative paths start from.
    root: str = "."
    #: Folder where tokenised shards are kept.
    cache_dir: str = "data/cache"
    #: Share of the documents held out for validation, chosen by the hash of their text.
    validation_fraction: Annotated[float, Gt(0), Lt(1)] = 0.05
    #: Share of the documents held out for the results that are reported.
    test_fraction: Annotated[float, Ge(0), Lt(1)] = 0.05
    #: Drop a training document whose 8-token shingles have at least this Jaccard
    #: similarity with a held-out document's; null keeps all.
    near_duplicate_threshold: Annotated[float, Gt(0), Le(1)] | None = 0.8
    #: Attend only to tokens of the same document.
    attention_within_documents: bool = False

    def __post_init__(self) -> None:
        if self.test_fraction + self.validation_fraction >= 1:
            raise ValueError(
                f"test_fraction = {self.test_fraction} and validation_fraction = "
                f"{self.validation_fraction} leave nothing to train on"
            )
        if not self.domain or set(self.domain) & set("/\\:") or self.domain.startswith("."):
            raise ValueError(f"domain = {self.domain!r}: expected a name fit for a folder")
        mixture_stages(self.weights)

    @property
    def weights(self) -> list[dict[int, float]]:
        """Weights of each source by the update from which on they hold.

        Raises:
            ValueError: naming the source whose weight is invalid.
        """
        schedules = []
        for i, source in enumerate(self.sources):
            weight = source.get("weight", 1.0)
            try:
                schedules.append(weight_schedule(weight))
            except ValueError as error:
                raise ValueError(f"sources.{i}.weight = {weight!r}: {error}") from None
        return schedules
