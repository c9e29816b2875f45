"""The model's settings, stated once and without torch.

`kanlm.config` nests them under `model:`, and `KanLMConfig` carries the same fields
into transformers' `config.json`. The options of a feed-forward kind are not here:
they are the keyword arguments of its class in `feed_forward/`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

#: More than any model has, so that what is a slip is refused before it is counted out.
MOST_LAYERS = 100_000
LARGEST = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Shape of the decoder.

    Raises:
        ValueError: naming the setting that is impossible.
    """

    #: Rows of the embedding; null takes the tokenizer's.
    vocab_size: int | None = None
    #: Width of the residual stream.
    d_model: int = 128
    #: Decoder blocks, each of attention and a feed-forward block.
    n_layers: int = 4
    #: Query heads, of width d_model / n_heads.
    n_heads: int = 4
    #: Key and value heads (grouped queries); null gives every query head its own.
    n_kv_heads: int | None = None
    #: Longest sequence, in tokens, that the model is trained on.
    context_length: int = 256
    #: One kind with its options for every layer, or a list with one entry a layer, where
    #: `repeat: n` in an entry stands for n equal ones.
    #: `hidden: null` is solved so that the block holds 8 d_model² parameters.
    feed_forward: dict[str, Any] | list[dict[str, Any]] = field(
        default_factory=lambda: {"kind": "kan"}
    )
    #: Probability of dropping an output of attention or feed-forward in training.
    dropout: float = 0.0
    #: Normalise queries and keys per head before the rotation.
    qk_norm: bool = False
    #: Use the embedding matrix as the output head.
    tie_embeddings: bool = True
    #: Base of the rotary positions' wavelengths.
    rope_theta: float = 10000.0
    #: Added to the mean square in RMS norms.
    norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("d_model", "n_layers", "n_heads", "context_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: expected a positive number")
            most = MOST_LAYERS if name == "n_layers" else LARGEST
            if getattr(self, name) > most:
                raise ValueError(f"{name} = {getattr(self, name)}: expected at most {most:,}")
        for name in ("rope_theta", "norm_epsilon"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)}: expected a positive number")
        if self.vocab_size is not None and not 2 <= self.vocab_size <= LARGEST:
            raise ValueError(
                f"vocab_size = {self.vocab_size}: expected at least 2, at most {LARGEST:,}"
            )
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads = {self.n_heads} does not divide d_model = {self.d_model}")
        if (self.d_model // self.n_heads) % 2:
            raise ValueError(
                f"d_model / n_heads = {self.d_model // self.n_heads} is odd: "
                "rotary positions need an even head dimension"
            )
        if self.n_kv_heads is not None and (self.n_kv_heads < 1 or self.n_heads % self.n_kv_heads):
            raise ValueError(
                f"n_kv_heads = {self.n_kv_heads} does not divide n_heads = {self.n_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout = {self.dropout}: expected 0 ≤ dropout < 1")
        if isinstance(self.feed_forward, list):
            # Here alone, so that nothing else need know the short form.
            count = sum(_repeat(entry, i) for i, entry in enumerate(self.feed_forward))
            if count != self.n_layers:
                raise ValueError(
                    f"feed_forward lists {count} layers, and n_layers = {self.n_layers}: "
                    "give one kind, or a list that adds up"
                )
            object.__setattr__(self, "feed_forward", _repeated(self.feed_forward))

    @property
    def feed_forward_by_layer(self) -> list[dict[str, Any]]:
        """The kind and options of every layer, `n_layers` long."""
        if isinstance(self.feed_forward, list):
            return self.feed_forward
        return [self.feed_forward] * self.n_layers


def _repeated(specs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write every entry with `repeat: n` n times."""
    layers = []
    for i, entry in enumerate(specs):
        spec = {name: value for name, value in entry.items() if name != "repeat"}
        layers.extend(dict(spec) for _ in range(_repeat(entry, i)))
    return layers


def _repeat(entry: dict[str, Any], i: int) -> int:
    """How many equal layers an entry of the list stands for."""
    repeat = entry.get("repeat", 1)
    if isinstance(repeat, bool) or not isinstance(repeat, int) or repeat < 1:
        raise ValueError(f"feed_forward.{i}.repeat = {repeat!r}: expected a whole number of layers")
    return repeat
