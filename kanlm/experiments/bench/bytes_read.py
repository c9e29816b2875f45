"""Weights that a forward pass reads at least, which bounds decoding."""

from torch import nn

from kanlm.kan import KANLinear
from kanlm.kan.bases import Local


def bytes_read(module: nn.Module, batch_size: int = 1) -> float:
    """Bytes of weights that a batch reads: of coefficients over a local basis, those that its
    inputs activate, expected for uniformly spread ones; of others, all."""
    total = 0.0
    seen = set()
    for part in module.modules():
        share = 1.0
        if isinstance(part, KANLinear) and isinstance(part.basis, Local):
            share = 1 - (1 - part.basis.support / part.basis.num_functions) ** batch_size
        for name, parameter in part.named_parameters(recurse=False):
            if parameter not in seen:
                size = parameter.numel() * parameter.element_size()
                total += size * (share if name == "coefficients" else 1.0)
            seen.add(parameter)
    return total
