"""What a model costs: parameters by part, FLOPs a token, bytes a decoded token.

Counts are read off the modules, built on the meta device without memory, so that nothing
is stated twice.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .attention import Attention
from .configuration import KanLMConfig
from .decoder import KanLMForCausalLM
from .feed_forward import FeedForward
from .layers import RMSNorm
from .settings import ModelSettings


@dataclass(frozen=True, kw_only=True)
class Accounting:
    """Counts of one model, each by part with their `total` last."""

    #: Label of the feed-forward kind; where layers differ, how many neighbours have which,
    #: such as `8×swiglu + 4×kan/bspline1-g6-silu`.
    feed_forward: str
    #: Parameters of `embedding`, `attention`, `feed_forward`, `norms` and `head`, which
    #: has none of its own when tied. A norm inside a block counts to the block.
    parameters: dict[str, int]
    #: Forward FLOPs a token of `attention`, `attention_scores`, `feed_forward`, `norms`
    #: and `head`, a multiply-add counting two, and in norms and feed-forward blocks an
    #: elementwise operation one. Of experts, those count that a token is sent to. Scores
    #: are those of a token that attends to a whole context; under causal attention the
    #: average token needs half of them.
    flops_per_token: dict[str, int]
    #: Parameters that one token makes use of: all but the experts it is not sent to.
    active_parameters: int
    #: Those that decoding one token reads: of the embedding, one row.
    decoded_parameters: int

    @property
    def training_flops_per_token(self) -> float:
        """FLOPs of forward and backward of the average token under causal attention.

        Backward is two products where forward is one (Kaplan et al., arXiv 2001.08361,
        table 1). Scores that attention computes again in backward do not count.
        """
        flops = self.flops_per_token
        return 3 * (flops["total"] - flops["attention_scores"] / 2)

    @property
    def recomputed_flops_per_token(self) -> float:
        """FLOPs on top where every decoder block is computed again in backward."""
        return self.training_flops_per_token / 3 - self.flops_per_token["head"]

    def bytes_per_decoded_token(self, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of weights that decoding one token reads; the KV cache comes on top."""
        return self.decoded_parameters * dtype.itemsize


def account(model: ModelSettings | KanLMConfig, vocab_size: int | None = None) -> Accounting:
    """Count a model that settings or a config describe.

    Args:
        vocab_size: tokens, where the settings leave them to the tokenizer.

    Raises:
        ValueError: the model cannot be built, or nobody says its vocabulary.
    """
    config = model
    if isinstance(config, ModelSettings):
        size = vocab_size if config.vocab_size is None else config.vocab_size
        if size is None:
            raise ValueError("vocab_size is null: accounting needs the number of tokens")
        config = KanLMConfig.from_settings(config, size)
    with torch.device("meta"):
        decoder = KanLMForCausalLM(config)
    embedding = decoder.model.embed_tokens
    blocks = decoder.model.feed_forwards
    attentions = [m for m in decoder.modules() if isinstance(m, Attention)]
    norms = _residual_norms(decoder)

    parameters = {
        "embedding": _count([embedding]),
        "attention": _count(attentions),
        "feed_forward": _count(blocks),
        "norms": _count(norms),
        "head": 0 if decoder.lm_head.weight is embedding.weight else _count([decoder.lm_head]),
    }
    flops = {
        "attention": sum(a.flops_per_token for a in attentions),
        "attention_scores": sum(a.score_flops(config.context_length) for a in attentions),
        "feed_forward": sum(block.flops_per_token for block in blocks),
        "norms": sum(norm.flops_per_token for norm in norms),
        "head": decoder.lm_head.flops_per_token,
    }
    active = {**parameters, "feed_forward": sum(block.active_parameters for block in blocks)}
    read = {**active, "embedding": config.d_model, "head": _count([decoder.lm_head])}
    return Accounting(
        feed_forward=_joined([block.label for block in blocks]),
        parameters={**parameters, "total": sum(parameters.values())},
        flops_per_token={**flops, "total": sum(flops.values())},
        active_parameters=sum(active.values()),
        decoded_parameters=sum(read.values()),
    )


def _joined(labels: Sequence[str]) -> str:
    """One label for all layers."""
    runs = [(label, len(list(equal))) for label, equal in itertools.groupby(labels)]
    if len(runs) == 1:
        return labels[0]
    return " + ".join(f"{length}×{label}" for label, length in runs)


def _residual_norms(decoder: KanLMForCausalLM) -> list[RMSNorm]:
    """The norms on the residual stream, not those inside a block."""
    inside = {
        norm
        for block in decoder.modules()
        if isinstance(block, FeedForward | Attention)
        for norm in block.modules()
    }
    return [m for m in decoder.modules() if isinstance(m, RMSNorm) and m not in inside]


def _count(modules: Iterable[nn.Module]) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())
