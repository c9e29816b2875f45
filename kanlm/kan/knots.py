"""Knot sequences: cells split, ends extended, and what a finer sequence makes of a spline."""

import torch
from torch import Tensor


def equally_spaced(ends: Tensor, cells: int, degree: int) -> Tensor:
    """Equal cells between the ends, (channels, 2), and `degree` more beyond each of them.

    The ends themselves are exact, so that their cells can be made again of them.

    Returns: (channels, cells + 2 degree + 1).
    """
    steps = torch.arange(-degree, cells + degree + 1, dtype=ends.dtype, device=ends.device)
    return torch.lerp(ends[:, :1], ends[:, 1:], steps / cells)


def extended(grid: Tensor, degree: int) -> Tensor:
    """Add `degree` knots beyond each end, a mean cell apart.

    They bound the outermost functions; any increasing choice spans the same splines on the
    grid. This is pykan's.

    Shapes: (channels, G + 1) → (channels, G + 2 degree + 1).
    """
    steps = torch.arange(1, degree + 1, dtype=grid.dtype, device=grid.device)
    beyond = steps * ((grid[:, -1:] - grid[:, :1]) / (grid.shape[1] - 1))
    return torch.cat([grid[:, :1] - beyond.flip(-1), grid, grid[:, -1:] + beyond], dim=1)


def split(knots: Tensor, parts: int) -> Tensor:
    """Split every cell into equal parts; the old knots stay exactly where they are.

    Shapes: (channels, K) → (channels, (K − 1) parts + 1).
    """
    steps = torch.arange(parts, dtype=knots.dtype, device=knots.device) / parts
    inserted = knots[:, :-1, None] + knots.diff()[:, :, None] * steps
    return torch.cat([inserted.flatten(1), knots[:, -1:]], dim=1)


def insertion_matrix(coarse: Tensor, fine: Tensor, degree: int) -> Tensor:
    """The matrix M with N_b = Σ_f M_fb N̂_f: B-splines as sums of those on a finer sequence.

    By the Oslo algorithm (Cohen, Lyche and Riesenfeld, Discrete B-splines and subdivision
    techniques, 1980): with t the coarse and τ the fine knots,

        α_{b,0}(f) = 1 where t_b ≤ τ_f < t_{b+1}, and 0 elsewhere
        α_{b,r}(f) = (τ_{f+r} − t_b) / (t_{b+r} − t_b) α_{b,r−1}(f)
                   + (t_{b+r+1} − τ_{f+r}) / (t_{b+r+1} − t_{b+1}) α_{b+1,r−1}(f)

    and M_fb = α_{b,degree}(f). No entry is negative, and every row sums to one.

    Args:
        coarse: (channels, K), increasing.
        fine: (channels, F), increasing; holds every coarse knot between its own ends.
        degree: of both.

    Returns: (channels, F − degree − 1, K − degree − 1).
    """
    rows, last = fine.shape[1] - degree - 1, coarse.shape[1] - 1
    t = coarse.unsqueeze(1)
    at = fine[:, :rows, None]
    alpha = ((t[..., :-1] <= at) & (at < t[..., 1:])).to(coarse.dtype)
    for r in range(1, degree + 1):
        at = fine[:, r : r + rows, None]
        rising = (at - t[..., : last - r]) / (t[..., r:last] - t[..., : last - r])
        falling = (t[..., r + 1 :] - at) / (t[..., r + 1 :] - t[..., 1 : last - r + 1])
        alpha = rising * alpha[..., :-1] + falling * alpha[..., 1:]
    return alpha
