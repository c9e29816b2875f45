"""What can be set of a benchmark, by `name=value` on the command line."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from kanlm.kan.kernels import Backend

_OTHER_BASES = ("chebyshev", "legendre", "rbf", "fourier", "wavelet", "rational", "implicit")

#: Tokenizers that need no download.
TrainedHere = Literal["bytes", "characters", "bpe"]


@dataclass(frozen=True, kw_only=True)
class LayerBenchmark:
    """Forward and backward of one block, at several widths."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    #: `d_model` of the blocks; every block has 8 d_model² parameters.
    widths: tuple[int, ...] = (256, 512, 768)
    tokens: int = 4096
    dtype: Literal["float32", "bfloat16"] = "float32"
    #: Blocks beside the compiled GELU MLP that all are measured against.
    blocks: tuple[Any, ...] = ("swiglu", "kan", "kan-local")
    #: What adds up the edges' functions of all blocks (kanlm.kan.kernels).
    backend: Backend = "auto"
    rounds: int = 9
    device: str = "cpu"
    output_dir: str = "runs/bench/layers"


@dataclass(frozen=True, kw_only=True)
class StepBenchmark:
    """A training step of a whole model."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    d_model: int = 512
    n_layers: int = 4
    n_heads: int = 8
    vocab_size: int = 8192
    context_length: int = 512
    batch_size: int = 4
    precision: Literal["fp32", "bf16"] = "fp32"
    #: Blocks beside SwiGLU, which all are compared with.
    blocks: tuple[Any, ...] = ("gelu", "kan", "kan-local")
    modes: tuple[Literal["eager", "compiled"], ...] = ("eager", "compiled")
    #: What adds up the edges' functions of all blocks (kanlm.kan.kernels).
    backend: Backend = "auto"
    rounds: int = 7
    device: str = "cpu"
    output_dir: str = "runs/bench/step"


@dataclass(frozen=True, kw_only=True)
class PeerBenchmark:
    """Forward and backward of one KAN layer, beside other repositories' layers."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    in_features: int = 256
    out_features: int = 256
    tokens: tuple[int, ...] = (1024, 4096)
    grid_size: int = 5
    degree: int = 3
    #: Name → folder of a checkout; `--peer NAME=PATH` adds one.
    peers: dict[str, str] = field(default_factory=dict)
    rounds: int = 5
    device: str = "cpu"
    output_dir: str = "runs/bench/peers"


@dataclass(frozen=True, kw_only=True)
class GrowthBenchmark:
    """Forward and backward of blocks, eagerly, as one of their sizes grows."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    tokens: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    widths: tuple[int, ...] = (128, 256, 512, 1024)
    #: Cells of linear B-splines, whose coefficients grow with them.
    grids: tuple[int, ...] = (4, 8, 16, 32)
    #: `d_model` and tokens while another size grows.
    width: int = 256
    token_count: int = 2048
    #: Blocks beside the GELU MLP, of equal parameters.
    blocks: tuple[Any, ...] = ("swiglu", "kan", "kan-local")
    rounds: int = 5
    device: str = "cpu"
    output_dir: str = "runs/bench/growth"

    def __post_init__(self) -> None:
        for name in ("tokens", "widths", "grids"):
            sizes = getattr(self, name)
            if len(set(sizes)) < 3:
                raise ValueError(f"{name} = {list(sizes)}: an exponent needs at least 3 sizes")


@dataclass(frozen=True, kw_only=True)
class DecodeBenchmark:
    """The blocks of a model given one new input after another, and the whole model."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    d_model: int = 768
    n_layers: int = 12
    n_heads: int = 12
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    #: Of whole models, at batch 1.
    vocab_sizes: tuple[int, ...] = (256, 8192, 49152)
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    #: Blocks beside the GELU MLP that all are measured against.
    blocks: tuple[Any, ...] = field(
        default=(
            {"kind": "kan-local", "basis": {"kind": "bspline", "grid_size": 6}},
            {"kind": "kan-local", "basis": {"kind": "bspline", "grid_size": 14}},
            {"kind": "kan-local", "base": None, "basis": {"kind": "bspline", "grid_size": 15}},
            {"kind": "kan-local", "base": None, "basis": {"kind": "bspline", "grid_size": 31}},
        )
    )
    rounds: int = 9
    #: Blocks of models that generate beside transformers' Llama.
    generated: tuple[Any, ...] = ("swiglu", "kan", "kan-glu", "kan-local")
    generated_vocab_sizes: tuple[int, ...] = (4096, 50304)
    #: More of them, in the first dtype and vocabulary alone.
    other_generated: tuple[Any, ...] = field(
        default=(
            "kan-single",
            "conv-kan",
            "moe",
            *({"kind": "kan", "basis": {"kind": kind}} for kind in _OTHER_BASES),
        )
    )
    generate_rounds: int = 5
    output_dir: str = "runs/bench/decode"


@dataclass(frozen=True, kw_only=True)
class DataBenchmark:
    """From text to batches."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    #: stdlib-prose, stdlib-code, hub:NAME, a path or a glob.
    source: str = "stdlib-code"
    #: Of its text, at most.
    megabytes: float = 12.0
    #: The first also makes the tokens that batches are cut from.
    tokenizers: tuple[TrainedHere, ...] = ("bpe", "bytes")
    #: Of bpe.
    vocab_size: int = 8192
    context_lengths: tuple[int, ...] = (128, 512, 2048)
    #: In a batch.
    batch_tokens: int = 2**16
    rounds: int = 5
    output_dir: str = "runs/bench/data"

    def __post_init__(self) -> None:
        if not self.tokenizers:
            raise ValueError("tokenizers = []: expected at least one")
        if not self.megabytes > 0:
            raise ValueError(f"megabytes = {self.megabytes}: expected more than 0")
