"""AdamW, or Muon with AdamW, over named groups that cover the model exactly.

Coefficients of bases get a group of their own: they are neither ordinary matrices nor
gains, and the best rate and decay for them are a question that users sweep. What a basis
owns itself (scales, denominators) has another: decay would pull a wavelet's scale or a
rational's pole to a place that is no smaller than any other.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz
from transformers import PreTrainedModel

from kanlm.config import OptimizerSettings
from kanlm.errors import UserError
from kanlm.kan import Basis, KANLinear
from kanlm.kan.sharding import gathered, split_as


def parameter_groups(model: nn.Module, settings: OptimizerSettings) -> list[dict[str, Any]]:
    """Split the model's trainable parameters into the optimizer's groups.

    - `matrices`: what has two dimensions or more and is in no other group;
    - `coefficients`: parameters named `coefficients`, with their own rate and decay;
    - `basis`: parameters of `Basis` modules, with their own rate and undecayed;
    - `vectors`: gains and biases, undecayed.

    With Muon also

    - `hidden`: those of `matrices` with two dimensions, but not the embedding and the head,
      which are tables rather than maps between hidden states;
    - `hidden_coefficients`, where it is given those: the coefficients of `KANLinear`.

    `algorithm` in each group is `adamw` or `muon`, `ratio` its rate over the scheduled one.

    Raises:
        RuntimeError: a trainable parameter is in no group, or in two.
    """
    muon = settings.kind == "muon"
    ratio = settings.coefficients_learning_rate_ratio
    muon_ratio = (settings.muon_learning_rate or settings.learning_rate) / settings.learning_rate
    #: Name → algorithm, decay, ratio.
    kinds = {
        "matrices": ("adamw", settings.weight_decay, 1.0),
        "hidden": ("muon", settings.weight_decay, muon_ratio),
        "coefficients": ("adamw", settings.coefficients_weight_decay, ratio),
        "hidden_coefficients": ("muon", settings.coefficients_weight_decay, muon_ratio * ratio),
        "basis": ("adamw", 0.0, settings.basis_learning_rate_ratio),
        "vectors": ("adamw", 0.0, 1.0),
    }
    members = {name: [] for name in kinds}
    in_bases = _owned(model, Basis)
    edges = _owned(model, KANLinear) if settings.muon_coefficients else set()
    tables = _tables(model)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter in in_bases:
            group = "basis"
        elif name.rsplit(".", 1)[-1] == "coefficients":
            group = "hidden_coefficients" if parameter in edges else "coefficients"
        elif parameter.ndim < 2:
            group = "vectors"
        else:
            hidden = muon and parameter.ndim == 2 and parameter not in tables
            group = "hidden" if hidden else "matrices"
        members[group].append(parameter)
    groups = [
        {
            "name": name,
            "params": members[name],
            "algorithm": algorithm,
            "weight_decay": decay,
            "ratio": ratio,
        }
        for name, (algorithm, decay, ratio) in kinds.items()
        if members[name]
    ]
    check_coverage(model, groups)
    return groups


def _owned(model: nn.Module, kind: type[nn.Module]) -> set[nn.Parameter]:
    """The parameters in modules of a kind."""
    return {
        p for module in model.modules() if isinstance(module, kind) for p in module.parameters()
    }


def _tables(model: nn.Module) -> set[nn.Parameter]:
    """Embedding matrices, and the head of a language model."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return _owned(model, nn.Embedding) | (set() if head is None else set(head.parameters()))


def check_coverage(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    """Raise RuntimeError, by name, unless each trainable parameter is in one group."""
    counts: dict[int, int] = {}
    for group in groups:
        for parameter in group["params"]:
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and counts.pop(id(parameter), 0) != 1:
            raise RuntimeError(f"parameter {name} is not in exactly one optimizer group")
    if counts:
        raise RuntimeError(f"{len(counts)} tensors in the optimizer are not trainable parameters")


def build_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimizer of `settings.kind` over `parameter_groups`.

    AdamW is Loshchilov & Hutter's (2019). Muon (Jordan et al. 2024) is torch's, with
    Moonshot's scale (Liu et al., arXiv 2502.16982, eq. 4), so that its updates are as large
    as AdamW's and take a rate and decay of the same size.

    Raises:
        UserError: Muon, and the model has no hidden matrix for it.
    """
    groups = parameter_groups(model, settings)
    if settings.kind == "adamw":
        return _adamw(groups, settings)
    return MuonAndAdamW(groups, settings)


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon and AdamW as one optimizer, each over the groups whose `algorithm` names it.

    To the outside there is one list of groups and one state by parameter, so that nobody
    who saves, loads, places or schedules an optimizer need know that there are two.

    Raises:
        UserError: there is no group `hidden`.
    """

    def __init__(self, groups: list[dict[str, Any]], settings: OptimizerSettings) -> None:
        by_muon, by_adamw = ([g for g in groups if g["algorithm"] == a] for a in ("muon", "adamw"))
        if not any(group["name"] == "hidden" for group in groups):
            raise UserError("optimizer.kind = muon: the model has no hidden matrix for it")
        self.parts: dict[str, torch.optim.Optimizer] = {
            "muon": _Muon(by_muon, lr=settings.learning_rate, adjust_lr_fn="match_rms_adamw")
        }
        if by_adamw:
            self.parts["adamw"] = _adamw(by_adamw, settings)
        # The parts have completed the groups by their own defaults.
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for algorithm, part in self.parts.items():
            # Loading replaces groups and state, so they are handed out anew each time.
            part.param_groups = [g for g in self.param_groups if g["algorithm"] == algorithm]
            part.state = self.state
            part.step()
        return loss


class _Muon(torch.optim.Muon):
    """torch's, for the coefficients of `KANLinear` and for sharded parameters too.

    Coefficients (in, B, out) are a matrix (out, in · B) to it.

    torch's own step fails where shards of coefficients differ in size, or a process has none
    of a matrix. Here a matrix is gathered for its update, which every process computes whole
    and keeps its part of; the momentum stays sharded.
    """

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        # torch looks for two dimensions in the groups that it starts with.
        matrices, coefficients = [], []
        for group in groups:
            flat = all(parameter.ndim == 2 for parameter in group["params"])
            (matrices if flat else coefficients).append(group)
        super().__init__(matrices, **options)
        for group in coefficients:
            self.add_param_group(group)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As `torch.optim.Muon.step`, but with whole matrices."""
        for group in self.param_groups:
            parameters, gradients, momenta = [], [], []
            self._init_group(group, parameters, gradients, momenta)
            for parameter, gradient, momentum in zip(parameters, gradients, momenta, strict=True):
                momentum.lerp_(gradient, 1 - group["momentum"])
                ahead = gradient.lerp(momentum, group["momentum"])
                update, rate = _whole_update(gathered(ahead), group)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(split_as(parameter, update, alike=True), alpha=-rate)


def _whole_update(gradient: Tensor, group: dict[str, Any]) -> tuple[Tensor, float]:
    """Muon's update of a matrix or of coefficients, shaped as they are, and its rate."""
    matrix = gradient if gradient.ndim == 2 else gradient.flatten(0, 1).T
    rate = _adjust_lr(group["lr"], group["adjust_lr_fn"], matrix.shape)
    update = _zeropower_via_newtonschulz(
        matrix, group["ns_coefficients"], group["ns_steps"], group["eps"]
    )
    return (update if gradient.ndim == 2 else update.T).reshape(gradient.shape), rate


def _adamw(groups: list[dict[str, Any]], settings: OptimizerSettings) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.epsilon, fused=True
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every group `learning_rate` times the group's own ratio."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["ratio"]


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """`learning_rate` of the first group, and `learning_rate/GROUP` of those that differ."""
    first, *others = optimizer.param_groups
    different = {f"learning_rate/{g['name']}": g["lr"] for g in others if g["lr"] != first["lr"]}
    return {"learning_rate": first["lr"], **different}
