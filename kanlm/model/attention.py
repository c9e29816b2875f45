"""Causal self-attention with rotary positions, grouped queries and optional QK norm."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .documents import Pieces
from .layers import Linear, RMSNorm

if TYPE_CHECKING:
    from .configuration import KanLMConfig


class Attention(nn.Module):
    """Scaled dot-product attention (Vaswani et al., arXiv 1706.03762) of n_heads queries
    over n_kv_heads keys and values (Ainslie et al., arXiv 2305.13245).

    The kernel is chosen by the config's `attn_implementation` among transformers' own
    (`sdpa` by default).

    Args:
        config: the model's.
        layer: index of the layer, its place in the cache.
        output_scale: gain of the output projection.
    """

    is_causal = True

    def __init__(self, config: "KanLMConfig", layer: int, output_scale: float) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.head_dim = config.d_model // config.n_heads
        self.num_key_value_groups = config.n_heads // config.num_key_value_heads
        kv_width = config.num_key_value_heads * self.head_dim
        self.q_proj = Linear(config.d_model, config.d_model)
        self.k_proj = Linear(config.d_model, kv_width)
        self.v_proj = Linear(config.d_model, kv_width)
        self.o_proj = Linear(config.d_model, config.d_model, gain=output_scale)
        self.q_norm = RMSNorm(self.head_dim, config.norm_epsilon) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_epsilon) if config.qk_norm else None

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            x: (batch, length, d_model).
            rotation: cosines and sines of `rotary_angles`.
            attention_mask: as transformers' `create_causal_mask` makes it for the kernel, or
                `within_documents`; None is plain causal.
            past_key_values: cache to extend by these tokens.

        Returns: (batch, length, d_model), and the weights where the kernel keeps them.
        """
        query, key, value = (self._heads(p(x)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, *rotation), rotate(key, *rotation)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer)
        attended, weights = self._kernel(attention_mask)(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=0.0,
            scaling=self.head_dim**-0.5,
            **kwargs,
        )
        return self.o_proj(attended.reshape(x.shape)), weights

    def _kernel(self, attention_mask: Any) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """What attends by such a mask, as one of transformers' attention functions."""
        if isinstance(attention_mask, Pieces):
            return attention_mask.attend
        name = str(self.config._attn_implementation)
        if isinstance(attention_mask, BlockMask):
            name = "flex_attention"
        return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention)

    @property
    def flops_per_token(self) -> int:
        """Forward FLOPs of projections, norms and rotation, without the scores."""
        projections = (self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        rotated_heads = (self.q_proj.out_features + self.k_proj.out_features) // self.head_dim
        norm = 0 if self.q_norm is None else self.q_norm.flops_per_token
        return sum(p.flops_per_token for p in projections) + rotated_heads * (
            norm + 3 * self.head_dim
        )

    def score_flops(self, length: int) -> int:
        """Forward FLOPs of one token's scores over `length` keys and of their mix of values."""
        return 4 * length * self.q_proj.out_features

    def _heads(self, x: Tensor) -> Tensor:
        """(batch, length, heads · head_dim) → (batch, heads, length, head_dim)."""
        return x.view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)


def rotary_angles(position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype):
    """Cosines and sines of the rotary embedding (Su et al., arXiv 2104.09864, eq. 15).

    Angles are computed here at every forward pass, in float32 or float64: there is no
    buffer that saving could lose, and no longest position.

    Args:
        position_ids: (batch, length).

    Returns: two tensors (batch, 1, length, head_dim) in float32 or float64; both halves of the
    last dimension hold the same angles, the sines of the first half negated.
    """
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, head_dim, 2, dtype=wide, device=position_ids.device) / head_dim
    angles = position_ids[:, None, :, None].to(wide) * theta**-exponents
    cosines, sines = angles.cos(), angles.sin()
    cosines, sines = torch.cat((cosines, cosines), dim=-1), torch.cat((-sines, sines), dim=-1)
    return cosines, sines


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn each pair (x_j, x_{j + head_dim/2}) by its angle, in the angles' dtype, and round to
    that of x: what attends and what a cache keeps is as narrow as values are.

    Angles in bfloat16, as Llamas in bfloat16 of transformers have them, would make a third
    rounding of two.
    """
    return torch.addcmul(x * cosines, x.roll(x.shape[-1] // 2, dims=-1), sines).to(x.dtype)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in plain operations, for `attn_implementation="eager"`: it keeps weights."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(dim=-1, dtype=wide).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights
