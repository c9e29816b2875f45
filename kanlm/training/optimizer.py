"""AdamW, or Muon with AdamW, over named groups that cover the model exactly.

Coefficients of bases get a group of their own: they are neither ordinary matrices nor
gains, and the best rate and decay for them are a question that users sweep. What a basis
owns itself (scales, denominators) has another: decay would pull a wavelet's scale or a
rational's pole to a place that is no smaller than any other.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kanlm.config import OptimizerSettings
from kanlm.errors import UserError
from kanlm.kan import Basis, KANLinear
from kanlm.training.muon import Muon


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

    AdamW is Loshchilov & Hutter's (2019), Muon is `kanlm.training.muon`'s, whose updates are as
    large as AdamW's and take a rate and decay of the same size.

    Raises:
        UserError: Muon, and the model has no hidden matrix for it.
    """
    groups = parameter_groups(model, settings)
    if settings.kind == "adamw":
        return _adamw(groups, settings)
    return MuonAndAdamW(groups, settings)


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon and AdamW as one optimizer, each over the groups whose `algorithm` names it.

    To the outside there is one list of groups and one state by parameter, so that code
    that saves, loads, places or schedules an optimizer need not know that there are two.

    Raises:
        UserError: there is no group `hidden`.
    """

    def __init__(self, groups: list[dict[str, Any]], settings: OptimizerSettings) -> None:
        by_muon, by_adamw = ([g for g in groups if g["algorithm"] == a] for a in ("muon", "adamw"))
        if not any(group["name"] == "hidden" for group in groups):
            raise UserError("optimizer.kind = muon: the model has no hidden matrix for it")
        self.parts: dict[str, torch.optim.Optimizer] = {
            "muon": Muon(by_muon, lr=settings.learning_rate)
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
