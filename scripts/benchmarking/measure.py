"""What benchmarks measure: times in turn, bytes kept for backward, bytes of weights read."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from kanlm.kan import KANLinear
from kanlm.kan.bases import Local


def interleaved(
    functions: Mapping[str, Callable[[], object]], rounds: int, synchronize: Callable[[], object]
) -> dict[str, list[float]]:
    """Measure seconds of every function in every round, each called once a round.

    Whatever slows the machine for a while then slows all alike. Two calls each before the first
    round compile, allocate and fill caches.

    Args:
        synchronize: called before the clock is read, for devices that run ahead.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Compute the median over rounds of seconds / reference, and its quartiles."""
    ratios = [one / other for one, other in zip(seconds, reference, strict=True)]
    low, middle, high = (
        statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    )
    return {"median": middle, "low": low, "high": high}


def synchronizer(device: str) -> Callable[[], object]:
    """Return what waits for a device to have done all that it was asked."""
    return torch.cuda.synchronize if device.startswith("cuda") else lambda: None


def saved_bytes(run: Callable[[Tensor], Tensor], x: Tensor, module: nn.Module) -> int:
    """Count bytes that autograd keeps beside the input and the module's own tensors.

    A storage counts once, however many saved tensors look into it.

    Args:
        run: `module`, or what torch.compile made of it.
    """
    own = {t.untyped_storage().data_ptr() for t in (x, *module.parameters(), *module.buffers())}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run(x)
    return sum(storages.values())


def bytes_read(module: nn.Module, batch_size: int = 1) -> float:
    """Count bytes of weights that a batch reads: of coefficients over a local basis, those that its
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


def warn_of_scalar_code(device: str, report: Callable[[str], object]) -> None:
    """Report where torch.compile would use no vector instructions.

    It looks for them by compiling a small program with a time limit, and without a word takes
    none where that ran out.
    """
    # Importing the compiler takes seconds.
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    if device == "cpu" and not pick_vec_isa():
        report(
            "torch.compile finds no vector instructions, so compiled times will mean little: it "
            "gives up looking on a busy machine; try again on a quiet one"
        )
