"""What every feed-forward kind is."""

from abc import ABC, abstractmethod

from torch import Tensor, nn


class FeedForward(nn.Module, ABC):
    """A map (…, d_model) → (…, d_model) through `hidden` channels.

    Arguments:
        d_model: width of the residual stream.
        hidden: inner width, the one number that matching solves for.
        output_scale: root mean square of the output at the start.
    """

    #: Structure and basis, such as `kan/bspline1-g6-silu`: a changed default then never
    #: changes what an old result means.
    label: str

    def __init__(self, d_model: int, hidden: int, output_scale: float) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"hidden = {hidden}: expected at least 1")
        self.d_model = d_model
        self.hidden = hidden
        self.output_scale = output_scale

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...

    @property
    @abstractmethod
    def flops_per_token(self) -> int:
        """Forward FLOPs, a multiply-add counting two, an elementwise operation one."""

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if module is not self and callable(reset):
                reset()
