"""Attention of packed documents to themselves alone, without a mask of every token by every other.

A dense mask keeps attention from its fast kernels and costs length² whatever documents are
like. On a GPU FlexAttention (Dong et al., arXiv 2412.05496) skips the tiles between documents; on a
CPU every long document is attended to by itself, and short ones a few at a time. Neither waits
for a GPU: where documents start stays on the device there, and on a CPU is in the host's memory.
"""

from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..kan.compilers import has_triton, no_c_compiler
from ..kan.tracing import constant_when_traced, is_jit_tracing

#: Documents are put together into pieces of at least so many tokens, which take a mask of
#: their own: on a CPU a call of the kernel costs as much as attention in such a piece.
PIECE = 64
#: The narrowest heads that FlexAttention takes.
NARROWEST = 16


def document_numbers(position_ids: Tensor) -> Tensor:
    """Number the documents of each row from 0: one starts where positions do not go on.

    Shapes: (batch, length) → (batch, length). As transformers' mask functions find them.
    """
    starts = position_ids.diff(dim=-1) != 1
    return nn.functional.pad(starts.cumsum(dim=-1), (1, 0))


def causal_within(documents: Tensor) -> Tensor:
    """True where a token may be attended to: (batch, length) → (batch, 1, length, length)."""
    places = torch.arange(documents.shape[-1], device=documents.device)
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same & (places[:, None] >= places)


def flex_mask(documents: Tensor, compiled: bool = False) -> BlockMask:
    """The same for FlexAttention, which asks by tiles.

    Args:
        compiled: make it without a dense mask meanwhile, in code of its own.
    """

    def within(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents[batch, query] == documents[batch, key])

    rows, length = documents.shape
    return create_block_mask(
        within, rows, None, length, length, device=str(documents.device), _compile=compiled
    )


def within_documents(documents: Tensor, x: Tensor, head_dim: int) -> "BlockMask | Pieces | Tensor":
    """What keeps attention within documents here, in the place of a mask for `sdpa`.

    Args:
        documents: (batch, length), as of `document_numbers`.
        x: (batch, length, d_model), what attends.
    """
    if x.device.type == "cpu":
        return Pieces(documents)
    fits = x.dtype != torch.float64 and head_dim >= NARROWEST
    if x.device.type == "cuda" and fits and _compiles_for_gpus():
        return flex_mask(documents, compiled=not torch.compiler.is_compiling())
    return causal_within(documents)


@constant_when_traced
def _compiles_for_gpus() -> bool:
    return has_triton() and no_c_compiler() is None


class Pieces:
    """Pieces of packed rows, of whole documents each.

    Args:
        documents: (batch, length), as of `document_numbers`, on a CPU.
    """

    def __init__(self, documents: Tensor) -> None:
        self.documents = documents

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: "Pieces",
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As transformers' `sdpa_attention_forward` with `causal_within`."""
        if torch.compiler.is_compiling() or is_jit_tracing():
            # Code for any documents has no room for a list of them.
            mask = causal_within(self.documents)
            return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        if self.pieces is None:
            return sdpa_attention_forward(module, query, key, value, None, **kwargs)
        sizes = [size for size, _ in self.pieces]
        parts = zip(*(_split(each, sizes) for each in (query, key, value)), strict=True)
        attended = [
            sdpa_attention_forward(module, q, k, v, mask, **kwargs)[0]
            for (q, k, v), (_, mask) in zip(parts, self.pieces, strict=True)
        ]
        rows, length = self.documents.shape
        return torch.cat(attended, dim=1).squeeze(0).unflatten(0, (rows, length)), None

    @cached_property
    def pieces(self) -> list[tuple[int, Tensor | None]] | None:
        """Their lengths, one after the other over all rows, and masks of those with several
        documents; None where each row is of one."""
        numbers = self.documents.numpy()
        if not numbers[:, -1].any():
            return None
        starts = np.diff(numbers, axis=1, prepend=-1) != 0
        found: list[tuple[int, Tensor | None]] = []
        for row, at in enumerate(starts):
            bounds = [*np.flatnonzero(at).tolist(), len(at)]
            for first, stop in _together(bounds):
                one = numbers[row, first] == numbers[row, stop - 1]
                mask = None if one else causal_within(self.documents[row : row + 1, first:stop])
                found.append((stop - first, mask))
        return found


def _together(bounds: list[int]) -> Iterator[tuple[int, int]]:
    """Where pieces of a row start and stop: long documents apart, short ones after one another."""
    first = 0
    for start, stop in pairwise(bounds):
        if stop - start >= PIECE and start > first:
            yield first, start
            first = start
        if stop - first >= PIECE or stop == bounds[-1]:
            yield first, stop
            first = stop


def _split(x: Tensor, sizes: list[int]) -> list[Tensor]:
    """(batch, heads, length, head_dim) → (1, heads, size, head_dim) each."""
    rows = x.transpose(1, 2).flatten(0, 1)
    return [part.transpose(0, 1).unsqueeze(0) for part in rows.split(sizes)]
