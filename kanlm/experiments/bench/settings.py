"""What can be set of a benchmark, by `name=value` on the command line."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from kanlm.kan.kernels import Backend

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
class DecodeBenchmark:
    """The blocks of a model given one new input after another."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    d_model: int = 768
    n_layers: int = 12
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
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
