"""A causal convolution over neighbouring tokens before a feed-forward block.

One byte or character says little, and a map of each token by itself can do little with
it. A short depthwise convolution gives the block a window of a few of them, as it gives
one to the state-space and linear-attention layers that made it standard (Fu et al., arXiv
2212.14052, section 3; Gu & Dao, arXiv 2312.00752, section 3.4).
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kan.initialization import assign_
from ...kan.sharding import whole_like
from ..layers import RMSNorm
from .base import Context, FeedForward


class CausalConvolution(nn.Module):
    """Each channel's weighted sum over a token and the `kernel_size` − 1 before it:

        y_t = Σ_{j=0}^{K−1} w_{K−1−j} ⊙ x_{t−j}

    which is `torch.nn.functional.conv1d` with `groups=channels`, padded on the left by
    zeros. Tokens before the row's start, at padding and of an earlier document count as 0.

    It starts near the identity: for uncorrelated tokens of mean square 1, the earlier ones
    carry NEIGHBOURS_SHARE of an output of mean square 1.
    """

    NEIGHBOURS_SHARE = 0.1

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        #: As conv1d has it; the last tap is the token's own.
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        neighbours = self.kernel_size - 1
        share = self.NEIGHBOURS_SHARE if neighbours else 0.0
        start = whole_like(self.weight)
        bound = math.sqrt(3 * share / neighbours) if neighbours else 0.0
        start.uniform_(-bound, bound)
        start[..., -1] = math.sqrt(1 - share)
        assign_(self.weight, start)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """(…, length, channels) → the same shape.

        Raises:
            ValueError: the cache has no place for the convolution's inputs.
        """
        length, reach = x.shape[-2], self.kernel_size - 1
        documents = None
        if context is not None:
            documents = context.documents
            if context.present is not None:
                x = x * context.present.unsqueeze(-1).to(x.dtype)
        seen = self._with_earlier(x, context)
        seen = F.pad(seen, (0, 0, max(0, reach + length - seen.shape[-2]), 0))
        y = x * self.weight[:, 0, -1]
        for back in range(1, self.kernel_size):
            stop = seen.shape[-2] - back
            earlier = seen[..., stop - length : stop, :]
            if documents is not None:
                before = F.pad(documents, (back, 0), value=-1)[..., :length]
                earlier = earlier * (before == documents).unsqueeze(-1).to(x.dtype)
            y = y + earlier * self.weight[:, 0, -1 - back]
        return y

    def _with_earlier(self, x: Tensor, context: Context | None) -> Tensor:
        """Put the cached inputs, as far as the kernel reaches, before x, and cache x too."""
        if context is None or context.past_key_values is None:
            return x
        cache = context.past_key_values
        # Caches that were not made for a model with such layers keep keys and values only.
        if not hasattr(cache.layers[context.layer], "update_conv_state"):
            raise ValueError(
                "past_key_values has no place for the inputs of a convolution: "
                "make it by DynamicCache(config=model.config)"
            )
        channels_first = cache.update_conv_state(
            x.transpose(-1, -2), context.layer, conv_kernel_size=self.kernel_size
        )
        return channels_first.transpose(-1, -2)

    @property
    def flops_per_token(self) -> int:
        return 2 * self.weight.numel()

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, kernel_size={self.kernel_size}"


class ConvKAN(FeedForward):
    """y = block(norm(convolution(x))): a causal depthwise convolution into a KAN block.

    The norm is there because a basis has a range, which a trained kernel would leave.

    Decoding keeps the last `kernel_size` inputs a layer in transformers' cache, beside keys
    and values: beam search reorders them and assisted decoding crops them.

    Args:
        kernel_size: tokens a channel sees, its own included.
        block: `{"kind": …}` with options, without `hidden`. An MLP here is the control that
            tells the convolution's merit from the KAN's.

    Raises:
        ValueError: kernel_size is less than 1, or the block is refused.
    """

    takes_context: ClassVar[bool] = True
    caches_inputs: ClassVar[bool] = True

    def __init__(
        self,
        d_model: int,
        hidden: int,
        output_scale: float,
        *,
        kernel_size: int = 4,
        block: dict[str, Any] = {"kind": "kan"},  # noqa: B006 (read, never changed)
    ) -> None:
        # The registry holds this class: it cannot be imported before.
        from . import make_feed_forward

        super().__init__(d_model, hidden, output_scale)
        if kernel_size < 1:
            raise ValueError(f"kernel_size = {kernel_size}: expected at least 1")
        self.convolution = CausalConvolution(d_model, kernel_size)
        self.norm = RMSNorm(d_model)
        self.block = make_feed_forward({**block, "hidden": hidden}, d_model, output_scale)
        if self.block.caches_inputs:
            raise ValueError("block: a layer has one convolution, not one in another")
        self.label = f"conv{kernel_size}-{self.block.label}"

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        x = self.norm(self.convolution(x, context))
        return self.block(x, context) if self.block.takes_context else self.block(x)

    @property
    def flops_per_token(self) -> int:
        parts = (self.convolution, self.norm, self.block)
        return sum(part.flops_per_token for part in parts)

    @property
    def active_parameters(self) -> int:
        own = sum(p.numel() for part in (self.convolution, self.norm) for p in part.parameters())
        return own + self.block.active_parameters
