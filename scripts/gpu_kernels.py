"""Are the kernels of the triton backend what they should be on GPUs that are not here?

Every kernel is compiled for an A100 (sm_80) and an H100 (sm_90) as `triton_launches` would
launch it: for each basis and dtype, in each configuration that the autotuner may choose among.
Triton brings NVIDIA's assembler, so no GPU is needed. Asked of each build:

- it compiles, to products on tensor cores;
- no register is spilled, and ptxas serialises no product;
- work overlaps in the inner loop. On sm_90 a product goes on while other work is done:
  `ttng.warp_group_dot_wait` lets one or more be pending. On sm_80 copies go on: `ttg.async_wait`
  lets one or more be in flight;

and of each kernel, that an output tile of 64 × 128 or more is among its configurations. How fast
it is no compiler knows.
"""

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

# Kernels are compiled here, not interpreted.
os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas_version
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from kanlm.kan import BSpline, Chebyshev, Hermite, Legendre
from kanlm.kan.bases import Basis
from kanlm.kan.kernels import triton_launches
from kanlm.kan.kernels.fused import triton_formula
from kanlm.kan.kernels.triton_launches import Launch, Target

HERE = Path(__file__).parent

BASES: dict[str, tuple[Basis, str]] = {
    "hermite3": (Hermite(degree=3), "none"),
    "chebyshev4": (Chebyshev(degree=4), "none"),
    "legendre2-linear": (Legendre(degree=2, outside="linear"), "identity"),
    "bspline1-g6": (BSpline(grid_size=6), "silu"),
    "bspline3-g6": (BSpline(grid_size=6, degree=3), "silu"),
}
#: Dtypes of inputs and of products. Under autocast inputs are float32.
DTYPES: dict[str, tuple[torch.dtype, torch.dtype]] = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "bf16-autocast": (torch.float32, torch.bfloat16),
    "tf32": (torch.float32, torch.float32),
}
#: An A100 and an H100.
ARCHITECTURES = {80: Target((8, 0), 108, 163 * 1024), 90: Target((9, 0), 132, 227 * 1024)}
KERNELS = ("sums", "input_gradients", "coefficient_gradients")
#: Tokens, inputs and outputs of the layer.
SHAPE = (8192, 1024, 2048)
#: Sides that an output tile of some configuration has at least, in either order.
LARGE = (64, 128)


class Case(NamedTuple):
    """A kernel in all its configurations; attributes are keys of the tables above."""

    architecture: int
    kernel: str
    basis: str
    dtype: str


@dataclass(frozen=True)
class Build:
    """A kernel in one configuration, as compiled.

    Attributes:
        error: why it did not compile, or None; what follows is then 0.
        function: name of what was compiled, with its module.
        registers: of a thread.
        spills: bytes that a thread spills.
        serialised: what ptxas says of products that wait for each other.
        shared: bytes of shared memory.
        products: instructions for tensor cores.
        pending: products that go on while the inner loop does other work.
        copies: groups of asynchronous copies in flight there.
        seconds: that compiling took.
    """

    architecture: int
    kernel: str
    basis: str
    dtype: str
    config: dict[str, int]
    tile: tuple[int, int]
    error: str | None = None
    function: str = ""
    registers: int = 0
    spills: int = 0
    serialised: tuple[str, ...] = ()
    shared: int = 0
    products: int = 0
    pending: int = 0
    copies: int = 0
    seconds: float = 0.0

    @property
    def faults(self) -> list[str]:
        """In what it is not as it should be."""
        if self.error is not None:
            return [f"does not compile: {self.error}"]
        faults = []
        if self.spills:
            faults.append(f"spills {self.spills} bytes")
        if self.serialised:
            faults.append("serialises products")
        if self.shared > ARCHITECTURES[self.architecture].shared:
            faults.append("takes more shared memory than there is")
        if not self.products:
            faults.append("does not use tensor cores")
        if self.architecture >= 90 and not self.pending:
            faults.append("waits for each product")
        if self.architecture < 90 and not self.copies:
            faults.append("waits for each copy")
        return faults


def launch_of(case: Case) -> Launch:
    """What would be launched for it, on tensors without memory."""
    basis, base = BASES[case.basis]
    formula = triton_formula(basis)
    assert formula is not None
    functions = basis.num_functions + (base != "none")
    tokens, inputs, outputs = SHAPE
    of_x, of_products = DTYPES[case.dtype]
    knots = None if formula.knots is None else formula.knots.to("meta")
    rest = (formula.name, tuple(formula.numbers), knots, base, ARCHITECTURES[case.architecture])
    x = torch.empty(tokens, inputs, dtype=of_x, device="meta")
    c = torch.empty(inputs, functions, outputs, dtype=of_products, device="meta")
    dy = torch.empty(tokens, outputs, dtype=of_products, device="meta")
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        if case.kernel == "sums":
            return triton_launches.sums(x, c, *rest)[1]
        if case.kernel == "input_gradients":
            return triton_launches.input_gradients(dy, x, c, *rest)[1]
        return triton_launches.coefficient_gradients(dy, x, functions, *rest)[1]
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def builds(case: Case, configs: Sequence[triton.Config] | None = None) -> Iterator[Build]:
    """The kernel of a case in each configuration that is offered, or in others."""
    launch = launch_of(case)
    for config in launch.configs if configs is None else configs:
        yield build(case, launch, config)


def build(case: Case, launch: Launch, config: triton.Config) -> Build:
    """Compile a kernel in one configuration."""
    sizes = config.kwargs
    tile = {
        "sums": ("TOKENS", "OUT"),
        "input_gradients": ("TOKENS", "IN"),
        "coefficient_gradients": ("IN", "OUT"),
    }[case.kernel]
    about = {
        **case._asdict(),
        "config": _about(config),
        "tile": (sizes[tile[0]], sizes[tile[1]]),
    }
    log, start = io.StringIO(), time.monotonic()
    options = {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "maxnreg": config.maxnreg,
    }
    try:
        with (
            knobs.nvidia.scope(),
            knobs.compilation.scope(),
            contextlib.redirect_stdout(log),
        ):
            knobs.nvidia.dump_ptxas_log = True
            # One from the cache brings no log.
            knobs.compilation.always_compile = True
            compiled = triton.compile(
                _source(launch, sizes),
                target=GPUTarget("cuda", case.architecture, 32),
                options=options,
            )
    except Exception as error:
        return Build(**about, error=f"{type(error).__name__}: {str(error)[:300]}")
    said, loops = log.getvalue(), "\n".join(_loops(compiled.asm["ttgir"]))
    function = launch.kernel.fn
    return Build(
        **about,
        function=f"{function.__module__.rpartition('.')[2]}.{function.__name__}",
        registers=_largest(r"Used (\d+) registers", said),
        spills=_largest(r"(\d+) bytes spill stores", said),
        serialised=tuple(line for line in said.splitlines() if "serialized" in line),
        shared=compiled.metadata.shared,
        products=len(re.findall(r"\bwgmma\.mma_async|\bmma\.sync", compiled.asm["ptx"])),
        pending=_largest(r"warp_group_dot_wait.*pendings = (\d+)", loops),
        copies=_largest(r"async_wait.*num = (\d+)", loops),
        seconds=round(time.monotonic() - start, 2),
    )


def _about(config: triton.Config) -> dict[str, int]:
    return config.kwargs | {"warps": config.num_warps, "stages": config.num_stages}


def _source(launch: Launch, sizes: dict[str, int]) -> ASTSource:
    """A kernel as the launch would specialise it: pointers at multiples of 16 bytes."""
    kernel = launch.kernel
    given = dict(zip(kernel.arg_names, launch.arguments, strict=False))
    constants = launch.constants | sizes
    constants |= {name: None for name, value in given.items() if value is None}
    signature, aligned = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif isinstance(given[name], torch.Tensor):
            signature[name] = f"*{_TYPES[given[name].dtype]}"
            aligned[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if given[name] % 16 == 0 and not kernel.params[index].do_not_specialize:
                aligned[(index,)] = [["tt.divisibility", 16]]
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    return source(kernel, signature, constants, aligned)


_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def _loops(ttgir: str) -> Iterator[str]:
    """The lines of every innermost loop."""
    opened: list[list[str]] = []
    for line in ttgir.splitlines():
        if re.search(r"\bscf\.for\b", line):
            opened.append([])
            depth = len(line) - len(line.lstrip())
            opened[-1].append(str(depth))
        elif opened and line.startswith(" " * int(opened[-1][0]) + "}"):
            loop = opened.pop()
            yield "\n".join(loop[1:])
        elif opened:
            opened[-1].append(line)


def _largest(pattern: str, text: str) -> int:
    return max(map(int, re.findall(pattern, text)), default=0)


def faults(found: Iterable[Build]) -> list[str]:
    """What is not as it should be, a line each."""
    lines, large = [], {}
    for one in found:
        name = f"sm_{one.architecture} {one.kernel} {one.basis} {one.dtype}"
        lines += [f"{name} {_sizes(one)}: {fault}" for fault in one.faults]
        rows, columns = one.tile
        large[name] = large.get(name, False) or (
            min(rows, columns) >= LARGE[0] and max(rows, columns) >= LARGE[1]
        )
    missing = [name for name, there in large.items() if not there]
    return lines + [f"{name}: no tile of {LARGE[0]} × {LARGE[1]} or more" for name in missing]


def _sizes(one: Build) -> str:
    return " ".join(f"{name}={size}" for name, size in one.config.items())


def line(one: Build) -> str:
    """A row of the table that is printed."""
    verdict = "; ".join(one.faults) or "ok"
    return (
        f"sm_{one.architecture} {one.kernel:21} {one.basis:16} {one.dtype:13} {_sizes(one):70} "
        f"registers {one.registers:3} spills {one.spills:4} shared {one.shared // 1024:3} KiB "
        f"products {one.products:3} pending {one.pending} copies {one.copies} "
        f"{one.seconds:5.1f} s  {verdict}"
    )


def report(found: Sequence[Build]) -> str:
    """scripts/gpu_kernels.md."""
    tokens, inputs, outputs = SHAPE
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE
    ).stdout.strip()
    rows = [
        "| GPU | kernel | dtype | basis | configurations | largest tile | registers | spills "
        "| serialised | shared, KiB | products pending | copies in flight |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in sorted({_case(one) for one in found}, reverse=True):
        some = [one for one in found if _case(one) == case]
        tile = max((one.tile for one in some), key=lambda sides: sides[0] * sides[1])
        rows.append(
            f"| sm_{case.architecture} | {case.kernel} | {case.dtype} | {case.basis} | {len(some)} "
            f"| {tile[0]} × {tile[1]} | {_range(one.registers for one in some)} "
            f"| {max(one.spills for one in some)} "
            f"| {sum(bool(one.serialised) for one in some)} "
            f"| {_range(one.shared // 1024 for one in some)} "
            f"| {_range(one.pending for one in some)} | {_range(one.copies for one in some)} |"
        )
    wrong = faults(found)
    return "\n".join(
        [
            "# What the Triton kernels are compiled to",
            "",
            f"Written by `./scripts/gpu_kernels` at commit {commit}, with Triton "
            f"{triton.__version__} and ptxas {_version(get_ptxas_version())}, for {tokens} tokens, "
            f"{inputs} inputs and {outputs} outputs. {len(found)} builds, {len(wrong)} faults. No "
            "GPU has run them: this says what they ask of one, not how fast they are.",
            "",
            "A range is over the configurations that the autotuner may choose among. Products "
            "pending are those that go on in the inner loop while other work is done "
            "(`ttng.warp_group_dot_wait`), copies in flight are groups of asynchronous copies "
            "(`ttg.async_wait`). Rows and columns of a tile are outputs; gradients hold one sum "
            "for each of several functions at every output.",
            "",
            *rows,
            *(["", "Faults:", ""] + [f"- {each}" for each in wrong] if wrong else []),
            "",
        ]
    )


def _case(one: Build) -> Case:
    return Case(one.architecture, one.kernel, one.basis, one.dtype)


def _range(numbers: Iterable[int]) -> str:
    low, *_, high = [*sorted(numbers)] * 2
    return str(low) if low == high else f"{low}–{high}"


def _version(said: str) -> str:
    found = re.search(r"V([\d.]+)", said)
    return found[1] if found else "of an unknown version"


def _offered(one: Build) -> bool:
    """Whether a configuration is still one that is offered."""
    return any(_about(config) == one.config for config in launch_of(_case(one)).configs)


def _read(files: Sequence[Path]) -> list[Build]:
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    tuples = ("tile", "serialised")
    found = [Build(**line | {name: tuple(line[name]) for name in tuples}) for line in lines]
    return [one for one in found if _offered(one)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="gpu_kernels", description="Compile the triton backend's kernels for real GPUs."
    )
    for name, choices in (
        ("architecture", ARCHITECTURES), ("kernel", KERNELS), ("basis", BASES), ("dtype", DTYPES)
    ):  # fmt: skip
        parser.add_argument(
            f"--{name}", nargs="+", choices=list(choices), type=type(next(iter(choices)))
        )
    parser.add_argument("--jsonl", type=Path, help="append a line of JSON for each build")
    parser.add_argument(
        "--read", type=Path, nargs="+", metavar="JSONL",
        help="write the report from such lines, for configurations still offered",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    options = parser.parse_args(arguments)
    chosen = (options.architecture, options.kernel, options.basis, options.dtype)
    cases = [
        Case(architecture, kernel, basis, dtype)
        for architecture in options.architecture or ARCHITECTURES
        for kernel in options.kernel or KERNELS
        for basis in options.basis or BASES
        for dtype in options.dtype or DTYPES
    ]
    found = _read(options.read or [])
    missing = [case for case in cases if case not in {_case(one) for one in found}]
    with ProcessPoolExecutor(options.jobs) as pool:
        for some in pool.map(_all_builds, missing):
            for one in some:
                print(line(one), flush=True)
                if options.jsonl:
                    with options.jsonl.open("a") as file:
                        file.write(json.dumps(asdict(one)) + "\n")
            found += some
    if chosen == (None,) * 4:
        HERE.joinpath("gpu_kernels.md").write_text(report(found))
        lines = [json.dumps(asdict(one)) for one in found]
        HERE.joinpath("gpu_kernels.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")
    wrong = faults(found)
    print(f"{len(found)} builds, {len(wrong)} faults")
    for each in wrong:
        print(each, file=sys.stderr)
    return 1 if wrong else 0


def _all_builds(case: Case) -> list[Build]:
    return list(builds(case))


if __name__ == "__main__":
    sys.exit(main())
