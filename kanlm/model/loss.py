"""The head and its cross-entropy, without logits of the whole batch in float32.

At a vocabulary of 50,304, logits of 16,384 tokens in float32 are 3.3 GB, and their softmax and
its gradient as much again: more than all activations of a small model. So logits of a chunk of
tokens are made, scored and turned into gradients before those of the next, as Liger does (Hsu et
al., arXiv 2410.10989, section 3.2). Vocabularies and batches that fit into one chunk are scored
whole, by transformers' own operations.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.loss.loss_utils import fixed_cross_entropy

from ..kan.casts import kept
from .layers import Linear

#: The label of a token that is not scored.
IGNORED = -100

#: Bytes of a chunk's logits in float32. A GPU's products are as fast at a thousand rows as at
#: more, and at a vocabulary of 50,304 a chunk has 1,280.
CHUNK_BYTES = 2**28
#: Rows of a chunk are a multiple of this, as tiles of products are made for.
TILE = 128


class Head(Linear):
    """The linear map to logits, which scores its own with labels.

    Labels come to `forward`, and not to a method of their own, so that whoever gives a module
    its parameters for the time of a call (FSDP2) does so here, too.
    """

    def forward(
        self,
        input: Tensor,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Logits, or with labels the cross-entropy in nats.

        Args:
            input: (…, d_model).
            labels: (…), the tokens to be predicted, or -100.
            num_items_in_batch: divisor of the summed loss in place of the number of labels.

        Returns: (…, vocab_size); with labels a scalar, in float32 or, for float64, in float64.
        """
        if labels is None:
            return super().forward(input)
        flat, targets = input.reshape(-1, input.shape[-1]), labels.reshape(-1).to(input.device)
        rows = _chunk_rows(flat.shape[0], self.weight.shape[0])
        if rows >= flat.shape[0]:
            logits = super().forward(input)
            return next_token_loss(
                logits, None, logits.shape[-1], num_items_in_batch, shift_labels=labels
            )
        if num_items_in_batch is None:
            num_items_in_batch = (targets != IGNORED).sum()
        return _chunked_loss(flat, self.weight, targets, num_items_in_batch, rows)


def next_token_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORED,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Cross-entropy as transformers' `ForCausalLMLoss`, which brings float64 to float32."""
    if shift_labels is None:
        assert labels is not None
        shift_labels = shifted(labels, ignore_index)
    logits = logits.reshape(-1, vocab_size)
    targets = shift_labels.reshape(-1).to(logits.device)
    rows = _chunk_rows(logits.shape[0], vocab_size)
    if rows >= logits.shape[0]:
        wide = logits.to(_wide(logits.dtype))
        items: Any = num_items_in_batch
        return fixed_cross_entropy(wide, targets, items, ignore_index)
    if num_items_in_batch is None:
        num_items_in_batch = (targets != ignore_index).sum()
    sums = [
        F.cross_entropy(x.to(_wide(x.dtype)), y, ignore_index=ignore_index, reduction="sum")
        for x, y in zip(logits.split(rows), targets.split(rows), strict=True)
    ]
    return torch.stack(sums).sum() / num_items_in_batch


def losses_by_token(head: nn.Module, x: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    """−ln p of each label, 0 where it is -100: (…, d_model) and (…) → (…).

    Logits are made a chunk at a time, and are kept if gradients are.
    """
    flat, targets = x.reshape(-1, x.shape[-1]), labels.reshape(-1)
    rows = _chunk_rows(flat.shape[0], vocab_size)
    losses = []
    for block, target in zip(flat.split(rows), targets.split(rows), strict=True):
        logits = head(block)
        wide = logits.to(_wide(logits.dtype))
        losses.append(F.cross_entropy(wide, target, ignore_index=IGNORED, reduction="none"))
    return torch.cat(losses).view(labels.shape)


def shifted(labels: Tensor, ignore_index: int = IGNORED) -> Tensor:
    """The label of the next token at each place, as everywhere in transformers."""
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _chunk_rows(tokens: int, vocab_size: int) -> int:
    """Tokens of a chunk: all, where they are few enough."""
    most = CHUNK_BYTES // (4 * vocab_size)
    return tokens if tokens <= most else max(1, most // TILE) * TILE


def _chunked_loss(
    x: Tensor, weight: Tensor, targets: Tensor, items: Tensor | int, rows: int
) -> Tensor:
    """Summed cross-entropy of x (N, d) @ weight.T (d, V) over `items`, `rows` tokens at a time.

    Gradients are made in forward, beside what they are made of, so that no logits are computed
    twice. They can be differentiated again, with whole logits.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    learns = torch.is_grad_enabled()
    needs = learns and x.requires_grad, learns and weight.requires_grad
    divisor = torch.as_tensor(items, device=x.device).to(_wide(dtype))
    run = _operator if torch.compiler.is_compiling() else _ChunkedLoss.apply
    with torch.autocast(device, enabled=False):
        loss, _, _ = run(x, weight, targets, divisor, rows, dtype, *needs)
    return loss


def _loss_and_gradients(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    divisor: Tensor,
    rows: int,
    dtype: torch.dtype,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients by x and weight, empty where there is no need.

    Args:
        dtype: of the products. Sums over tokens are in float32, or float64.
    """
    wide = _wide(dtype)
    matrix = kept(lambda: weight.to(dtype), dtype, weight)
    loss = torch.zeros((), dtype=wide, device=x.device)
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    dweight = torch.zeros_like(weight, dtype=wide) if need_dweight else weight.new_empty(0)
    shares = ((targets != IGNORED) / divisor).unsqueeze(-1)
    # Labels that are no tokens are refused where they are looked up.
    safe = targets.masked_fill(targets == IGNORED, 0).unsqueeze(-1)
    for start in range(0, x.shape[0], rows):
        here = slice(start, start + rows)
        block = x[here].to(dtype)
        scores = F.log_softmax(block @ matrix.T, dim=-1, dtype=wide)
        loss -= (scores.gather(-1, safe[here]) * shares[here]).sum()
        if not (need_dx or need_dweight):
            continue
        # softmax − one-hot, over the divisor.
        scores = scores.exp_().mul_(shares[here])
        dlogits = scores.scatter_add_(-1, safe[here], -shares[here].to(wide)).to(dtype)
        del scores
        if need_dx:
            dx[here] = dlogits @ matrix
        if need_dweight and dtype == wide:
            dweight.addmm_(dlogits.T, block)
        elif need_dweight:
            dweight += dlogits.T @ block
    return loss, dx, dweight


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, targets, divisor, *_ = inputs
    _, dx, dweight = output
    ctx.save_for_backward(x, weight, targets, divisor, dx, dweight)
    ctx.needs = inputs[-2:]


def _backward(ctx: Any, dloss: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, targets, divisor, dx, dweight = ctx.saved_tensors
    need_dx, need_dweight = ctx.needs
    if torch.is_grad_enabled():  # for `create_graph`
        dx, dweight = _differentiable_gradients(x, weight, targets, divisor)
    found = (
        (dx * dloss).to(x.dtype) if need_dx else None,
        (dweight * dloss).to(weight.dtype) if need_dweight else None,
    )
    return *found, *[None] * 6


def _differentiable_gradients(
    x: Tensor, weight: Tensor, targets: Tensor, divisor: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients by x and weight, by operations that autograd knows."""
    shares = ((targets != IGNORED) / divisor).unsqueeze(-1)
    hot = F.one_hot(targets.clamp_min(0), weight.shape[0])
    dlogits = ((x @ weight.T).softmax(dim=-1) - hot) * shares
    return dlogits @ weight, dlogits.T @ x


class _ChunkedLoss(torch.autograd.Function):
    """`_loss_and_gradients` for eager torch."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _loss_and_gradients(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        _save(ctx, inputs, output)

    backward = staticmethod(_backward)


# For torch.compile one operator: its partitioner would keep the logits of all chunks for backward.
# Named after this module, because a copy of it may travel with an exported model.
_operator = torch.library.custom_op(
    f"{__name__.replace('.', '_')}::loss_and_gradients", _loss_and_gradients, mutates_args=()
)


@_operator.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    divisor: Tensor,
    rows: int,
    dtype: torch.dtype,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = _wide(dtype)
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    dweight = torch.zeros_like(weight, dtype=wide) if need_dweight else weight.new_empty(0)
    return x.new_empty((), dtype=wide), dx, dweight


_operator.register_autograd(_backward, setup_context=_save)
