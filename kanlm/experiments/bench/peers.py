"""Forward and backward of one KAN layer beside those of other repositories.

1. Both layers have the same shape, functions on the same grid, and a SiLU base.
2. Bytes kept for backward are counted.
3. Ours and the peer's, eager and compiled, take turns; each is compared with ours in its mode.

A peer comes from the `bench` extra, or from a checkout: `--peer NAME=PATH`.
"""

import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kanlm.errors import UserError
from kanlm.experiments.bench.compiled import warn_of_scalar_code
from kanlm.experiments.bench.saved import saved_bytes
from kanlm.experiments.bench.settings import PeerBenchmark
from kanlm.experiments.bench.timing import interleaved, ratio, synchronizer
from kanlm.kan import RBF, BSpline, KANLinear


@dataclass(frozen=True)
class Peer:
    """How another repository's layer is made."""

    #: The module to import.
    module: str
    #: The layer, of that module and the settings.
    make: Callable[[Any, PeerBenchmark], nn.Module]
    #: Whether its functions are Gaussians rather than B-splines.
    gaussians: bool = False


class _FirstResult(nn.Module):
    """A layer that returns more than its output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def _pykan(module: Any, settings: PeerBenchmark) -> nn.Module:
    layer = module.KANLayer(
        settings.in_features,
        settings.out_features,
        num=settings.grid_size,
        k=settings.degree,
        device=settings.device,
    )
    return _FirstResult(layer)


def _splines(name: str) -> Callable[[Any, PeerBenchmark], nn.Module]:
    """The layer `name` of a module, with the arguments that two repositories agree on."""

    def make(module: Any, settings: PeerBenchmark) -> nn.Module:
        return getattr(module, name)(
            settings.in_features,
            settings.out_features,
            grid_size=settings.grid_size,
            spline_order=settings.degree,
        )

    return make


def _fast_kan(module: Any, settings: PeerBenchmark) -> nn.Module:
    return module.FastKANLayer(
        settings.in_features,
        settings.out_features,
        num_grids=settings.grid_size + settings.degree,
        use_layernorm=False,
    )


PEERS = {
    "inkan": Peer("inkan", _splines("KANLayer")),
    "pykan": Peer("kan.KANLayer", _pykan),
    "efficient-kan": Peer("efficient_kan", _splines("KANLinear")),
    "fast-kan": Peer("fastkan", _fast_kan, gaussians=True),
}


def measure_peers(settings: PeerBenchmark, report: Callable[[str], object]) -> list[dict]:
    """Two rows a peer, number of tokens and mode, ours and theirs: time over ours, bytes kept.

    Peers of the `bench` extra are taken where they are installed.

    Raises:
        UserError: a peer is unknown, its folder holds no such package, or there is none.
    """
    checkouts = _checkouts(settings.peers)
    warn_of_scalar_code(settings.device, report)
    rows = []
    for name, peer in PEERS.items():
        with _importable(checkouts.get(name)):
            try:
                module = importlib.import_module(peer.module)
            except ImportError as error:
                if name in checkouts:
                    raise UserError(f"--peer {name}={checkouts[name]}: {error}") from None
                report(f"{name}: not installed")
                continue
        for tokens in settings.tokens:
            report(f"{name}, {tokens:,} tokens")
            rows += _measure_peer(settings, name, peer, module, tokens, report)
    if not rows:
        raise UserError(
            "no peer to measure: install pip install 'kanlm[bench]', or give a checkout by "
            "--peer NAME=PATH"
        )
    return rows


def _checkouts(peers: Mapping[str, str]) -> dict[str, Path]:
    for name, path in peers.items():
        if name not in PEERS:
            near = get_close_matches(name, PEERS, n=1)
            hint = f"; did you mean '{near[0]}'" if near else ""
            raise UserError(f"--peer {name}={path}: expected one of {', '.join(PEERS)}{hint}")
        if not Path(path).is_dir():
            raise UserError(f"--peer {name}={path}: there is no such folder")
    return {name: Path(path) for name, path in peers.items()}


@contextmanager
def _importable(checkout: Path | None) -> Iterator[None]:
    """Have modules of a checkout, or of its `src`, found first."""
    folders = [] if checkout is None else [str(checkout / "src"), str(checkout)]
    sys.path[:0] = folders
    try:
        yield
    finally:
        for folder in folders:
            sys.path.remove(folder)


def our_layer(settings: PeerBenchmark, peer: Peer) -> KANLinear:
    """Our layer with as many functions of the peer's sort on its grid."""
    if peer.gaussians:
        basis = RBF(centers=settings.grid_size + settings.degree)
    else:
        basis = BSpline(grid_size=settings.grid_size, degree=settings.degree, grid_range=(-1, 1))
    return KANLinear(
        settings.in_features, settings.out_features, basis=basis, base="silu", bias=False
    )


def _measure_peer(
    settings: PeerBenchmark,
    name: str,
    peer: Peer,
    module: Any,
    tokens: int,
    report: Callable[[str], object],
) -> list[dict]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    layers = {
        "kanlm": our_layer(settings, peer).to(settings.device),
        name: peer.make(module, settings).to(settings.device),
    }
    # Within the grid that all of them start with.
    x = 2 * torch.rand(tokens, settings.in_features, device=settings.device) - 1
    x.requires_grad_()
    rows = []
    for mode in ("eager", "compiled"):
        runs = dict(layers)
        if mode == "compiled":
            runs = {label: torch.compile(layer) for label, layer in layers.items()}
        try:
            kept = {label: saved_bytes(run, x, layers[label]) for label, run in runs.items()}
            steps = {
                label: functools.partial(_step, run, layers[label], x)
                for label, run in runs.items()
            }
            seconds = interleaved(steps, settings.rounds, synchronizer(settings.device))
        except Exception as error:  # whatever the compiler makes of somebody else's code
            if mode == "eager":
                raise
            report(f"{name}: torch.compile fails: {str(error).splitlines()[0]}")
            continue
        rows += [
            {
                "peer": name,
                "layer": label,
                "tokens": tokens,
                "mode": mode,
                "time_ratio": ratio(seconds[label], seconds["kanlm"]),
                "seconds": sorted(seconds[label])[settings.rounds // 2],
                "saved_bytes": kept[label],
                "parameters": sum(p.numel() for p in layers[label].parameters()),
            }
            for label in layers
        ]
    return rows


def _step(run: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> None:
    module.zero_grad(set_to_none=True)
    x.grad = None
    run(x).sum().backward()
