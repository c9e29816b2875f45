"""What a sequence of domains taught and what it cost, from a matrix of losses.

`losses` is (stages, domains): L[i, j] is the held-out loss on domain j after stage i.
Stage 0 is pretraining, stage i trained on domain i, T is the last stage; columns past T
are domains that were never trained on and are not looked at. Losses are in bits per byte
here, but any loss that averages will do; not perplexity, whose differences mean nothing.

Signs: forgetting is positive where a domain got worse, transfer and gain are positive
where it got better. Libraries differ in this and in what they divide by, so each function
states its formula. Means run over the domains for which the term exists, never over T + 1
with zeros padded in.
"""

import numpy as np


def average_final_loss(losses: np.ndarray) -> float:
    """1/(T+1) Σ_j L[T, j], over all domains trained on."""
    return float(_trained(losses)[-1].mean())


def forgetting(losses: np.ndarray) -> np.ndarray:
    """F_j = L[T, j] − L[j, j] for j < T: against just having learned it; (T,)."""
    trained = _trained(losses)
    return (trained[-1] - trained.diagonal())[:-1]


def forgetting_from_best(losses: np.ndarray) -> np.ndarray:
    """L[T, j] − min over l < T of L[l, j] for j < T (Chaudhry et al. 2018); (T,).

    Never less than `forgetting`: a later stage may have helped domain j before the last
    stage hurt it.
    """
    trained = _trained(losses)
    if len(trained) == 1:
        return np.zeros(0)
    return (trained[-1] - trained[:-1].min(axis=0))[:-1]


def backward_transfer(losses: np.ndarray) -> float | None:
    """−1/T Σ_{j<T} F_j (Lopez-Paz and Ranzato 2017, for a loss); None with one stage."""
    lost = forgetting(losses)
    return float(-lost.mean()) if len(lost) else None


def forward_transfer(losses: np.ndarray) -> np.ndarray:
    """L[0, j] − L[j−1, j] for 1 ≤ j ≤ T: what the stages between taught of j; (T,).

    Against the pretrained model, not a random one, which any training would beat. The
    first entry is 0 by definition.
    """
    trained = _trained(losses)
    return trained[0, 1:] - trained.diagonal(offset=1)


def learning_gain(losses: np.ndarray) -> np.ndarray:
    """G_j = L[j−1, j] − L[j, j] for 1 ≤ j ≤ T: what its own stage taught of j; (T,)."""
    trained = _trained(losses)
    return trained.diagonal(offset=1) - trained.diagonal()[1:]


def _trained(losses: np.ndarray) -> np.ndarray:
    """The square part, (T + 1, T + 1)."""
    stages, domains = losses.shape
    if domains < stages:
        raise ValueError(f"{stages} stages but {domains} domains: each stage trains a new one")
    return losses[:, :stages]
