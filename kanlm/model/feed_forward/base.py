"""What every feed-forward kind is."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import Cache


@dataclass(kw_only=True)
class Context:
    """What a block may know of one forward pass beside its input."""

    #: Index of the decoder layer, its place in the cache.
    layer: int
    #: (batch, length), False at padding; None where nothing is padded.
    present: Tensor | None = None
    #: (batch, length), the number of a token's document in its row; None where each row
    #: is of one document.
    documents: Tensor | None = None
    #: Cache of earlier tokens.
    past_key_values: "Cache | None" = None
    #: Scalars that training minimises beside the loss in nats, weighted, each a mean over
    #: tokens. The block appends its own in training mode.
    auxiliary_losses: list[Tensor] = field(default_factory=list)


class FeedForward(nn.Module, ABC):
    """A map (…, d_model) → (…, d_model) through `hidden` channels.

    Most kinds map each token by itself. One that looks at other tokens, or has something
    to say to the training loss, sets `takes_context` and is called with a `Context`, or
    without one where it is used on its own.

    Args:
        d_model: width of the residual stream.
        hidden: inner width, the one number that matching solves for. A kind without one
            sets `has_width` to False, and is built with d_model in its place.
        output_scale: root mean square of the output at the start.
    """

    #: Structure and basis, such as `kan/bspline1-g6-silu`: a changed default then never
    #: changes what an old result means.
    label: str
    #: Whether there is an inner width. Without one the block costs what it costs, and
    #: matching adjusts its twins.
    has_width: ClassVar[bool] = True
    #: Whether `forward` takes a Context after its input.
    takes_context: ClassVar[bool] = False
    #: Whether it keeps inputs of its own in the cache, by `Cache.update_conv_state`.
    caches_inputs: ClassVar[bool] = False

    def __init__(self, d_model: int, hidden: int, output_scale: float) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"hidden = {hidden}: expected at least 1")
        self.d_model = d_model
        self.hidden = hidden
        self.output_scale = output_scale

    @classmethod
    def width_multiple(cls, options: Mapping[str, Any]) -> int:
        """The number that `hidden` must be a multiple of, given all the kind's options."""
        return 1

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...

    @property
    @abstractmethod
    def flops_per_token(self) -> int:
        """Forward FLOPs, a multiply-add counting two, an elementwise operation one."""

    @property
    def active_parameters(self) -> int:
        """Parameters that one token makes use of: all but those of experts it skips."""
        return sum(parameter.numel() for parameter in self.parameters())

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if module is not self and callable(reset):
                reset()
