"""The fixed functions that a layer can lay beside its basis on every edge."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

BaseFunction = Literal["silu", "identity"]

BASE_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "identity": lambda x: x}
#: FLOPs at one input, counted as `Basis.flops_per_input`.
BASE_FLOPS = {"silu": 4, "identity": 0}
