"""Forward and backward of one KAN layer beside those of other repositories.

1. Both layers have the same shape, functions on the same grid, and a SiLU base.
2. Bytes kept for backward are counted.
3. Ours and the peer's, eager and compiled, take turns; each is compared with ours in its mode.

A peer comes from the `bench` extra, or from a checkout: `peers.NAME=PATH`.
"""

import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarking.measure import interleaved, ratio, saved_bytes, synchronizer, warn_of_scalar_code
from benchmarking.report import Results, markdown_table, rules, where
from kanlm.errors import UserError
from kanlm.kan import RBF, BSpline, KANLinear
from kanlm.reporting.format import MISSING, count, duration, fixed, span
from kanlm.reporting.table import Table


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Forward and backward of one KAN layer, beside other repositories' layers."""

    in_features: int = 256
    out_features: int = 256
    tokens: tuple[int, ...] = (1024, 4096)
    grid_size: int = 5
    degree: int = 3
    #: Name → folder of a checkout; `peers.NAME=PATH` adds one.
    peers: dict[str, str] = field(default_factory=dict)
    rounds: int = 5
    device: str = "cpu"
    output_dir: str = "runs/bench/peers"


# Measuring


@dataclass(frozen=True)
class Peer:
    """How another repository's layer is made."""

    #: The module to import.
    module: str
    #: The layer, of that module and the settings.
    make: Callable[[Any, Settings], nn.Module]
    #: Whether its functions are Gaussians rather than B-splines.
    gaussians: bool = False


class _FirstResult(nn.Module):
    """A layer that returns more than its output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def _pykan(module: Any, settings: Settings) -> nn.Module:
    layer = module.KANLayer(
        settings.in_features,
        settings.out_features,
        num=settings.grid_size,
        k=settings.degree,
        device=settings.device,
    )
    return _FirstResult(layer)


def _splines(name: str) -> Callable[[Any, Settings], nn.Module]:
    """Make the layer `name` of a module, with the arguments that two repositories agree on."""

    def make(module: Any, settings: Settings) -> nn.Module:
        return getattr(module, name)(
            settings.in_features,
            settings.out_features,
            grid_size=settings.grid_size,
            spline_order=settings.degree,
        )

    return make


def _fast_kan(module: Any, settings: Settings) -> nn.Module:
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


def measure(settings: Settings, report: Callable[[str], object]) -> list[dict]:
    """Return two rows a peer, number of tokens and mode, ours and theirs: times, bytes kept.

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
                    raise UserError(f"peers.{name}={checkouts[name]}: {error}") from None
                report(f"{name}: not installed")
                continue
        for tokens in settings.tokens:
            report(f"{name}, {tokens:,} tokens")
            rows += _measure_peer(settings, name, peer, module, tokens, report)
    if not rows:
        raise UserError(
            "no peer to measure: install pip install 'kanlm[bench]', or give a checkout by "
            "peers.NAME=PATH"
        )
    return rows


def _checkouts(peers: Mapping[str, str]) -> dict[str, Path]:
    for name, path in peers.items():
        if name not in PEERS:
            near = get_close_matches(name, PEERS, n=1)
            hint = f"; did you mean '{near[0]}'" if near else ""
            raise UserError(f"peers.{name}={path}: expected one of {', '.join(PEERS)}{hint}")
        if not Path(path).is_dir():
            raise UserError(f"peers.{name}={path}: there is no such folder")
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


def our_layer(settings: Settings, peer: Peer) -> KANLinear:
    """Return our layer with as many functions of the peer's sort on its grid."""
    if peer.gaussians:
        basis = RBF(centers=settings.grid_size + settings.degree)
    else:
        basis = BSpline(grid_size=settings.grid_size, degree=settings.degree, grid_range=(-1, 1))
    return KANLinear(
        settings.in_features, settings.out_features, basis=basis, base="silu", bias=False
    )


def _measure_peer(
    settings: Settings,
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


# Showing


def tables(results: Results) -> list[Table]:
    """Tabulate two rows a peer, number of tokens and mode."""
    settings = results["settings"]
    names = ("peer", "tokens", "mode")
    keys = dict.fromkeys(tuple(row[name] for name in names) for row in results["rows"])
    groups = [where(results, **dict(zip(names, key, strict=True))) for key in keys]

    def cells(row: Mapping[str, Any], ours: Results) -> list[str]:
        return [
            row["layer"],
            f"{row['tokens']:,}",
            row["mode"],
            fixed(row["time_ratio"]["median"], 2),
            span([row["time_ratio"]["low"], row["time_ratio"]["high"]], 2),
            duration(row["seconds"]),
            _times(row["saved_bytes"], ours["saved_bytes"]),
            count(row["saved_bytes"], "B"),
            count(row["parameters"]),
        ]

    table = Table(
        title=f"Forward and backward of a layer {settings['in_features']} → "
        f"{settings['out_features']}, {settings['grid_size']} cells, degree {settings['degree']}",
        columns=[
            "layer",
            "tokens",
            "mode",
            "× our time",
            "quartiles",
            "time",
            "× our memory",
            "kept for backward",
            "parameters",
        ],
        rows=[cells(row, group[0]) for group in groups for row in group],
        note="Above each peer stands kanlm with functions of the same sort: B-splines, or for "
        "fast-kan as many Gaussians. Memory is what autograd keeps beside the input.",
        rules=rules(groups),
    )
    return [table]


def _times(bytes_kept: int, ours: int) -> str:
    """Format the ratio to ours, which may be nothing at all."""
    return fixed(bytes_kept / ours, 1) if ours else MISSING


def section(results: Results) -> str:
    """Return the benchmark's part of the page, in Markdown."""
    settings, rows = results["settings"], results["rows"]
    table = [
        [
            row["peer"],
            f"{row['tokens']:,}",
            row["mode"],
            fixed(row["time_ratio"]["median"], 2),
            count(row["saved_bytes"], "B"),
            count(ours["saved_bytes"], "B"),
        ]
        for ours, row in zip(rows[::2], rows[1::2], strict=True)
    ]
    heads = ["layer", "tokens", "mode", "× our time", "keeps for backward", "ours keeps"]
    return (
        f"**Other repositories' layers**, {settings['in_features']} → {settings['out_features']}, "
        f"{settings['grid_size']} cells, degree {settings['degree']}: time over that of a "
        "`KANLinear` with functions of the same sort, in the same mode.\n\n"
        + markdown_table(heads, table)
    )
