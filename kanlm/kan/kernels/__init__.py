"""How a layer adds up its edges' functions: one contract, several backends.

    y_o = Σ_i [ Σ_b φ_b(x_i) c_ibo + w_oi base(x_i) ] + bias_o

`edge_sums` is the contract, `dispatch` picks a backend and lets a caller pick one.

- `reference`: the formula in plain torch, `Basis.contract`. Autograd keeps the expanded basis,
  B times the input. Every transform of torch applies.
- `recompute`: the same products, but only input and coefficients are kept for backward, and
  the basis is evaluated again. In float32 on a CPU cpu_gemm.cpp evaluates it inside the products,
  also under torch.compile. Elsewhere tokens go eagerly through torch's products in blocks, with the
  base as one more function, and compiled one generated kernel evaluates the basis for one product.
- `torch`: as `recompute`, by torch's products alone.
- `few`: for few tokens, without gradients: reads each coefficient that plays a part once, as it
  lies; of local bases, on a CPU, those of functions that differ from zero.
- `sparse`: the same for local bases alone, on any device: on GPUs it has not been timed.
- `triton`: for NVIDIA GPUs, polynomials and B-splines of degree 0 to 3 on equal cells: the basis,
  and the base beside it, are evaluated in registers inside the product, and on an H100 beside it.
  So far its kernels have run on CPUs alone, and been compiled for GPUs (scripts/gpu_kernels.md
  says to what), but timed on none.

`auto` times nothing and takes `recompute` where it can. `measured.fastest_backend` times those of
`recompute`, `torch` and `triton` that could serve on the machine at hand, as training does before
its first step; `prefer_backend` then has `auto` take the fastest.

A new backend is a `Backend` of dispatch.py, why it cannot (`_OBSTACLES`) and its sums (`_SUMS`);
to be timed, one of `measured.CANDIDATES`.
"""

from .dispatch import (
    BACKENDS,
    Backend,
    TrainingBackend,
    edge_sums,
    prefer_backend,
    prepared_sums,
    use_backend,
)
from .few_tokens import Edges, few_sums

__all__ = [
    "BACKENDS",
    "Backend",
    "Edges",
    "TrainingBackend",
    "edge_sums",
    "few_sums",
    "prefer_backend",
    "prepared_sums",
    "use_backend",
]
