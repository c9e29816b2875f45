"""What a sequence of domains taught and what it cost, from losses on held-out text.

`losses` is (…, stages, domains): L[i, j] is the held-out loss on domain j after stage i.
Stage 0 is pretraining, stage i trained on domain i, T is the last stage; columns past T
are domains that were never trained on and are not looked at. Leading axes (arms, seeds,
strategies) are kept. Where the order of domains differs, as between seeds whose curriculum
is permuted, `in_order` brings the columns into the order of the stages first. Losses are in
bits per byte here, but any loss that averages will do; not perplexity, whose differences
mean nothing.

Signs: forgetting, intransigence and the stability gap are positive where a domain got
worse, transfer and gain are positive where it got better. Sources write these formulas for
an accuracy, so that every difference is turned round here. Libraries differ in signs and in
what they divide by: GEM's code divides backward transfer by all tasks, the last of which
contributes 0, Mammoth pads with zeros, and Avalanche's forgetting, first less last, would be
negative for a loss that grew. Here each function states its formula, and means run over the
domains for which the term exists.

What was not measured is NaN, and whatever needs it is NaN: a mean over the rest would be
that of other domains.
"""

from typing import NamedTuple

import numpy as np


def in_order(losses: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Bring the columns into the order in which the domains were trained on.

    Args:
        losses: (…, stages, domains).
        order: (…, k) column of the domain of stages 0 to k − 1; its leading axes must be
            broadcastable to those of `losses`.

    Returns:
        (…, stages, k).

    Raises:
        ValueError: an order names a column twice, or one that is not there.
    """
    order = np.asarray(order)
    if order.min() < 0 or order.max() >= losses.shape[-1]:
        raise ValueError(f"order: expected columns 0 to {losses.shape[-1] - 1}")
    if (np.diff(np.sort(order, axis=-1), axis=-1) == 0).any():
        raise ValueError("order: a domain stands in it twice")
    columns = np.broadcast_to(
        order[..., np.newaxis, :], (*losses.shape[:-2], losses.shape[-2], order.shape[-1])
    )
    return np.take_along_axis(losses, columns, axis=-1)


def average_final_loss(losses: np.ndarray) -> np.ndarray:
    """1/(T+1) Σ_j L[T, j], over all domains trained on; (…)."""
    return _trained(losses)[..., -1, :].mean(axis=-1)


def forgetting(losses: np.ndarray) -> np.ndarray:
    """F_j = L[T, j] − L[j, j] for j < T: against just having learned it; (…, T)."""
    trained = _trained(losses)
    return (trained[..., -1, :] - _diagonal(trained))[..., :-1]


def forgetting_from_best(losses: np.ndarray) -> np.ndarray:
    """L[T, j] − min over l < T of L[l, j] for j < T; (…, T).

    Chaudhry et al. 2018 (Riemannian Walk, arXiv 1801.10112), for a loss. Never less than
    `forgetting`: a later stage may have helped domain j before the last stage hurt it.
    """
    trained = _trained(losses)
    if trained.shape[-1] == 1:
        return trained[..., 0, :0]
    return (trained[..., -1, :] - trained[..., :-1, :].min(axis=-2))[..., :-1]


def backward_transfer(losses: np.ndarray) -> np.ndarray:
    """−1/T Σ_{j<T} F_j; (…), NaN with one stage.

    Lopez-Paz and Ranzato 2017 (GEM, arXiv 1706.08840, eq. 3), for a loss: positive where
    later stages helped.
    """
    return -_mean(forgetting(losses))


def forward_transfer(losses: np.ndarray) -> np.ndarray:
    """L[0, j] − L[j−1, j] for 1 ≤ j ≤ T: what the stages between taught of j; (…, T).

    GEM's (eq. 4) is against a model that was never trained, which any language model beats
    by far; this is against the pretrained one. The first entry is 0 by definition.
    """
    trained = _trained(losses)
    return trained[..., 0, 1:] - _diagonal(trained, offset=1)


def learning_gain(losses: np.ndarray) -> np.ndarray:
    """G_j = L[j−1, j] − L[j, j] for 1 ≤ j ≤ T: what its own stage taught of j; (…, T)."""
    trained = _trained(losses)
    return _diagonal(trained, offset=1) - _diagonal(trained)[..., 1:]


def intransigence(losses: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """L[j, j] − L*_j for 1 ≤ j ≤ T: what was not learned of j though it could be; (…, T).

    Chaudhry et al. 2018 (arXiv 1801.10112), for a loss.

    Args:
        losses: (…, stages, domains).
        reference: (…, domains) loss L*_j of a model that was free to learn j: by joint
            training on all domains, or by plain training on j alone. Which, is to be said.
    """
    trained = _trained(losses)
    return (_diagonal(trained) - np.asarray(reference)[..., : trained.shape[-1]])[..., 1:]


def normalised_forgetting(losses: np.ndarray, untrained: np.ndarray | None = None) -> np.ndarray:
    """F_j / G_j for j < T: the share of what a stage taught that later ones took; (…, T).

    NaN where the stage taught nothing (G_j ≤ 0), of which no share can be taken.

    Args:
        losses: (…, stages, domains).
        untrained: (…) loss on domain 0 of the model before pretraining, from which
            G_0 = untrained − L[0, 0]. Without it the entry of domain 0 is NaN.
    """
    trained = _trained(losses)
    lost = forgetting(losses)
    first = np.full(trained.shape[:-2], np.nan) if untrained is None else np.asarray(untrained)
    taught = np.concatenate(
        [(first - trained[..., 0, 0])[..., np.newaxis], learning_gain(losses)], axis=-1
    )[..., :-1]
    return np.divide(lost, taught, out=np.full_like(lost, np.nan), where=taught > 0)


class StabilityGap(NamedTuple):
    """How far the loss on an old domain rose while something else was learned."""

    #: (…) at its worst.
    max: np.ndarray
    #: (…) on average over the steps measured after the first.
    mean: np.ndarray


def stability_gap(losses: np.ndarray) -> StabilityGap:
    """max over s > 0 of L(s) − L(0), and its mean.

    De Lange et al. 2023 (arXiv 2205.13452): a model may lose a domain early in a stage and
    find it again by its end, which losses at the stages' ends do not show.

    Args:
        losses: (…, steps) on one old domain, its loss before the first update at index 0. A
            step that was not measured is NaN and is left out; what was measured must be
            measured alike, all on a fixed subset or all on the whole split.

    Returns:
        NaN where the first step, or every other, was not measured.
    """
    rise = losses[..., 1:] - losses[..., :1]
    measured = ~np.isnan(rise)
    some = measured.any(axis=-1)
    most = np.where(measured, rise, -np.inf).max(axis=-1, initial=-np.inf)
    total = np.where(measured, rise, 0.0).sum(axis=-1)
    mean = total / np.maximum(measured.sum(axis=-1), 1)
    return StabilityGap(np.where(some, most, np.nan), np.where(some, mean, np.nan))


def drift(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Token-mean KL(p_0 ‖ p) of a model's predictions before and after, in nats; (…).

    Args:
        before, after: (…, tokens, vocabulary) natural logarithms of probabilities.
    """
    before, after = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    # 0 · log 0 is 0: what had no probability before adds nothing.
    difference = np.subtract(before, after, out=np.zeros_like(before), where=before > -np.inf)
    return (np.exp(before) * difference).sum(axis=-1).mean(axis=-1)


def _trained(losses: np.ndarray) -> np.ndarray:
    """The square part, (…, T + 1, T + 1)."""
    stages, domains = losses.shape[-2:]
    if domains < stages:
        raise ValueError(f"{stages} stages but {domains} domains: each stage trains a new one")
    return losses[..., :stages]


def _diagonal(matrix: np.ndarray, offset: int = 0) -> np.ndarray:
    """L[j, j + offset], (…, T + 1 − offset)."""
    return matrix.diagonal(offset, axis1=-2, axis2=-1)


def _mean(values: np.ndarray) -> np.ndarray:
    """Over the last axis; NaN where that is empty."""
    return values.mean(axis=-1) if values.shape[-1] else np.full(values.shape[:-1], np.nan)
