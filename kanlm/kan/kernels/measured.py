"""Which backend trains a model's layers fastest on this machine, measured on throwaway tensors."""

import hashlib
import json
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from ..bases import Differentiable
from ..cpp_build import cache_folder, processor
from ..layer import KANLinear
from . import cpu_gemm
from .dispatch import TrainingBackend, edge_sums, obstacle_of, use_backend

#: Those that could serve, by the type of device. The first is taken where none is `_MARGIN` faster.
CANDIDATES: dict[str, tuple[TrainingBackend, ...]] = {
    "cpu": ("recompute", "torch"),
    "cuda": ("recompute", "triton"),
}
#: What they are, for people.
NAMES = {
    ("cpu", "recompute"): "C++",
    ("cpu", "torch"): "torch",
    ("cuda", "recompute"): "torch",
    ("cuda", "triton"): "triton",
}
BACKENDS = get_args(TrainingBackend)
_MARGIN = 0.95
_ROUNDS = 3
#: Floating-point operations of one pass over all shapes, by device: a few tens of milliseconds.
_MOST_FLOPS = {"cpu": 1e9, "cuda": 1e12}
_FEWEST_TOKENS = 128


class Measured(NamedTuple):
    """What was found.

    Attributes:
        backend: the fastest.
        seconds: of a forward and backward pass over all layers' shapes, by backend; empty where
            there was nothing to choose.
        tokens: in that pass.
        failed: backend → why it could not be compiled or launched.
    """

    backend: TrainingBackend
    seconds: Mapping[TrainingBackend, float]
    tokens: int
    failed: Mapping[TrainingBackend, str]


def remembered_backend(
    model: nn.Module,
    *,
    tokens: int,
    autocast: torch.dtype | None = None,
    compiled: bool = False,
) -> Measured:
    """Return what `fastest_backend` found when this machine was first asked for such layers.

    Times are never twice the same, and two backends differ by rounding: without a memory a run
    that is started again from nothing might end with other weights. It is a file in kanlm's cache,
    for a processor or GPU, number of threads, version of torch, shapes and settings. Where the
    cache cannot be used, backends are timed each time.

    Args:
        tokens, autocast, compiled: as of `fastest_backend`.
    """

    def measure() -> Measured:
        return fastest_backend(model, tokens=tokens, autocast=autocast, compiled=compiled)

    try:
        asked = (*_machine(model), _shapes(model), tokens, str(autocast), compiled)
        key = hashlib.sha256(repr(asked).encode()).hexdigest()[:16]
        path = cache_folder("backends") / f"{key}.json"
    except (OSError, RuntimeError):
        return measure()
    known = _read(path)
    if known is not None:
        return known
    with suppress(OSError):
        path.unlink()
    found = measure()
    if found.failed:
        return found
    with suppress(OSError):
        draft = path.with_name(f"{key}-{os.getpid()}.draft")
        draft.write_text(json.dumps([found.backend, found.seconds, found.tokens]))
        # Of two that measure at once the first decides, for both.
        with suppress(FileExistsError):
            path.hardlink_to(draft)
        draft.unlink()
    return _read(path) or found


def _read(path: Path) -> Measured | None:
    """What was remembered; None if nothing that can be read."""
    try:
        backend, seconds, tokens = json.loads(path.read_text())
        return Measured(backend, {**seconds}, tokens, {}) if backend in BACKENDS else None
    except (OSError, ValueError, TypeError):
        return None


def _machine(model: nn.Module) -> tuple[object, ...]:
    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.__version__, torch.cuda.get_device_name(device)
    return torch.__version__, processor(), torch.get_num_threads()


def _shapes(model: nn.Module) -> list[str]:
    """Shapes of the KAN layers, and how many there are of each."""
    layers = [module for module in model.modules() if isinstance(module, KANLinear)]
    counts = Counter((*_shape(each), str(each.coefficients.dtype)) for each in layers)
    return sorted(map(repr, counts.items()))


def fastest_backend(
    model: nn.Module,
    *,
    tokens: int,
    autocast: torch.dtype | None = None,
    compiled: bool = False,
    candidates: Sequence[TrainingBackend] | None = None,
) -> Measured:
    """Time forward and backward passes of a model's KAN layers, by each backend that could serve.

    Of the layers' own tensors only the bases are read, and no random state changes. Large layers
    are timed with fewer tokens, so that all takes a few hundred milliseconds (and what compiling
    takes, for `compiled`).

    Args:
        tokens: in a forward pass.
        autocast: dtype that products are computed in, if it is not that of the weights.
        compiled: time what torch.compile makes of it.
        candidates: the backends, of which a single one is only tried; those of the device unless
            given.

    Returns:
        The fastest, or the first where others are not faster by 5%. One that fails is left out,
        with a warning; `recompute` is taken where none is left.
    """
    layers = [module for module in model.modules() if isinstance(module, KANLinear)]
    if not layers:
        return Measured("recompute", {}, 0, {})
    device = layers[0].coefficients.device
    chosen = CANDIDATES.get(device.type, ()) if candidates is None else tuple(candidates)
    counts = Counter(map(_shape, layers))
    shapes = {_shape(layer): layer for layer in layers}
    work = sum(6 * layer.coefficients.numel() for layer in shapes.values())
    tokens = min(tokens, max(_FEWEST_TOKENS, int(_MOST_FLOPS.get(device.type, 1e9) / work)))
    narrow = nullcontext() if autocast is None else torch.autocast(device.type, autocast)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad(), narrow:
        obstacles = {key: _obstacles(chosen, layer) for key, layer in shapes.items()}
        shapes = {key: layer for key, layer in shapes.items() if not obstacles[key]}
        if candidates is not None and not shapes:
            return _left_out(next(iter(obstacles.values())))
        differ = candidates is not None or any(_differ(layer) for layer in shapes.values())
        if not shapes or not differ:
            return Measured("recompute", {}, 0, {})
        passes = {
            key: _training_pass(layer, tokens, compiled=compiled) for key, layer in shapes.items()
        }
        failed: dict[TrainingBackend, str] = {
            each: why for each in chosen if (why := _failure(each, passes.values()))
        }
        able: list[TrainingBackend] = [each for each in chosen if each not in failed]
        seconds: dict[TrainingBackend, float] = dict.fromkeys(able, 0.0)
        for key, run in passes.items():
            for each, best in _interleaved(run, able, device).items():
                seconds[each] += counts[key] * best
    _left_out(failed)
    return Measured(_fastest(able, seconds), seconds, tokens, failed)


def _left_out(failed: Mapping[TrainingBackend, str]) -> Measured:
    """Warn of backends that are not used, and why."""
    for backend, why in failed.items():
        warnings.warn(f"the kernels of backend {backend!r} are not used: {why}", stacklevel=3)
    return Measured("recompute", {}, 0, failed)


def _fastest(
    able: Sequence[TrainingBackend], seconds: Mapping[TrainingBackend, float]
) -> TrainingBackend:
    if not able:
        return "recompute"
    fastest = min(able, key=lambda each: seconds[each])
    return fastest if seconds[fastest] < _MARGIN * seconds[able[0]] else able[0]


def _shape(layer: KANLinear) -> tuple[object, ...]:
    """What layers have in common that take as long."""
    return tuple(layer.coefficients.shape), layer.basis.label, layer.base


def _obstacles(backends: Iterable[TrainingBackend], layer: KANLinear) -> dict[TrainingBackend, str]:
    """Backends that cannot add up a layer, and why."""
    x, coefficients, _ = _tensors(layer, 1)
    found: dict[TrainingBackend, str] = {}
    for each in backends:
        why = obstacle_of(each, x, coefficients, layer.basis)
        if why is not None:
            found[each] = why
    return found


def _differ(layer: KANLinear) -> bool:
    """Whether the candidates compute a layer by different kernels."""
    x, coefficients, weight = _tensors(layer, 1)
    if x.device.type != "cpu":
        return True
    if torch.is_autocast_enabled("cpu") or not isinstance(layer.basis, Differentiable):
        return False
    return cpu_gemm.can(layer.basis.cpp_formulas(), x, coefficients, weight)


def _tensors(layer: KANLinear, tokens: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inputs over the range of usual ones, and weights, of a layer's shapes."""
    inputs, functions, out = layer.coefficients.shape
    device, dtype = layer.coefficients.device, layer.coefficients.dtype

    def ramp(*shape: int, end: float) -> Tensor:
        numbers = torch.arange(torch.Size(shape).numel(), device=device) % 1013
        return (end * (numbers / 506 - 1)).to(dtype).view(shape).requires_grad_()

    weight = None if layer.base is None else ramp(out, inputs, end=0.1)
    return ramp(tokens, inputs, end=2.0), ramp(inputs, functions, out, end=0.1), weight


def _training_pass(layer: KANLinear, tokens: int, *, compiled: bool) -> Callable[[], None]:
    tensors = _tensors(layer, tokens)
    given = [tensor for tensor in tensors if tensor is not None]
    basis, base = layer.basis, layer.base

    def forward(x: Tensor, coefficients: Tensor, weight: Tensor | None) -> Tensor:
        return edge_sums(x, coefficients, basis, base, weight)

    add_up = torch.compile(forward, dynamic=False) if compiled else forward

    def run() -> None:
        y = add_up(*tensors)
        torch.autograd.grad(y, given, torch.ones_like(y))

    return run


def _failure(backend: TrainingBackend, passes: Iterable[Callable[[], None]]) -> str | None:
    """Why a backend cannot run what it says it can, or None; it compiles what it has to."""
    try:
        for run in passes:
            _run(backend, run)
    # Whatever a compiler or a driver raises.
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    return None


def _run(backend: TrainingBackend, run: Callable[[], None]) -> None:
    with use_backend(backend):
        run()


def _interleaved(
    run: Callable[[], None], backends: Iterable[TrainingBackend], device: torch.device
) -> dict[TrainingBackend, float]:
    """Least seconds of a pass by each of several backends, which take turns."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best: dict[TrainingBackend, float] = dict.fromkeys(backends, float("inf"))
    for _ in range(_ROUNDS):
        for each in best:
            wait()
            start = time.perf_counter()
            _run(each, run)
            wait()
            best[each] = min(best[each], time.perf_counter() - start)
    return best
