"""KanLMConfig: `ModelSettings` as transformers wants it."""

import dataclasses
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from .feed_forward import FEED_FORWARDS
from .matching import resolve_feed_forward
from .settings import ModelSettings

_FIELDS = {field.name: field for field in dataclasses.fields(ModelSettings)}


def _default(name: str) -> Any:
    """A dataclass field with the default that ModelSettings gives the same name."""
    field = _FIELDS[name]
    if field.default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=field.default_factory)
    return field.default


class KanLMConfig(PreTrainedConfig):
    """Configuration of a `KanLMForCausalLM`: the fields of `ModelSettings`, documented
    there, and the ids of special tokens. `feed_forward` may be a kind's bare name.

    Feed-forward options left open, and the width, are filled in when the config is made,
    so that `config.json` states them and no changed default changes a saved model.

    Raises:
        ValueError: a setting is impossible.
    """

    model_type = "kanlm"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "max_position_embeddings": "context_length",
        "tie_word_embeddings": "tie_embeddings",
        "rms_norm_eps": "norm_epsilon",
    }

    vocab_size: int | None = _default("vocab_size")
    d_model: int = _default("d_model")
    n_layers: int = _default("n_layers")
    n_heads: int = _default("n_heads")
    n_kv_heads: int | None = _default("n_kv_heads")
    context_length: int = _default("context_length")
    feed_forward: str | dict[str, Any] | list[dict[str, Any]] = _default("feed_forward")
    dropout: float = _default("dropout")
    qk_norm: bool = _default("qk_norm")
    tie_embeddings: bool = _default("tie_embeddings")
    rope_theta: float = _default("rope_theta")
    norm_epsilon: float = _default("norm_epsilon")
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.feed_forward, str):
            self.feed_forward = {"kind": self.feed_forward}
        self.feed_forward = resolve_feed_forward(self.settings).feed_forward
        super().__post_init__(**kwargs)

    @classmethod
    def from_settings(
        cls,
        settings: ModelSettings,
        vocab_size: int,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
    ) -> "KanLMConfig":
        """Make the config of a model for a tokenizer of `vocab_size` tokens."""
        fields = {name: getattr(settings, name) for name in _FIELDS}
        return cls(
            **{**fields, "vocab_size": vocab_size},
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
        )

    @property
    def settings(self) -> ModelSettings:
        """The settings that this config carries."""
        return ModelSettings(**{name: getattr(self, name) for name in _FIELDS})

    @property
    def num_key_value_heads(self) -> int:
        """Key and value heads, by the name transformers' caches ask for."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def layer_types(self) -> list[str]:
        """What each layer keeps in a cache, by transformers' names: a `hybrid` one has the
        inputs of a convolution beside keys and values."""
        return [
            "hybrid" if FEED_FORWARDS[spec["kind"]].caches_inputs else "full_attention"
            for spec in self.settings.feed_forward_by_layer
        ]


AutoConfig.register(KanLMConfig.model_type, KanLMConfig)
