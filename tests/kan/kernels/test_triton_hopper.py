"""The kernels for an H100, run line for line on a CPU, where only what Gluon's names mean differs.

Their functions are called as the Python that they are, with `gl` and the rest replaced by what
follows. It is as asynchronous as a GPU may be: a copy arrives only when it is waited for, and
until then its tile is NaN; a product reads its tiles when it is waited for, and they must by then
be those that it was started with; what warps share is overwritten only after a barrier that all
reach when they have read it. Layouts, which only the compiler knows, are left out.
"""

import itertools
import sys
import types
from typing import Any

import pytest
import torch

from kanlm.kan import BSpline, Chebyshev, Hermite, Legendre
from kanlm.kan.kernels import fused

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="there is no triton but for Linux"
)


class Machine:
    """One program at a time, and what it has started."""

    def __init__(self) -> None:
        self.groups: list[list[tuple[Tile, torch.Tensor]]] = []
        self.copies: list[tuple[Tile, torch.Tensor]] = []
        self.products: list[Sum] = []
        self.barriers = 0
        self.fenced = 0
        self.waits = 0
        self.place: tuple[int, ...] = (0, 0)
        self.overlapped = 0

    # Copies, whose every wait Triton follows by a barrier.

    def copy(self, tile: "Tile", pointer: "Pointer", mask: torch.Tensor) -> None:
        assert tile.read_at < self.barriers, "a tile is overwritten that others may still read"
        assert tile not in [busy for product in self.products for busy in product.tiles]
        tile.numbers.fill_(torch.nan)
        self.copies.append((tile, pointer.load(mask, 0.0)))

    def commit(self) -> None:
        self.groups.append(self.copies)
        self.copies = []

    def wait_for_copies(self, left: int = 0) -> None:
        while len(self.groups) > left:
            for tile, numbers in self.groups.pop(0):
                tile.numbers.copy_(numbers)
                self.waits += 1
                tile.arrived_at = self.waits
        self.barriers += 1

    def fence(self) -> None:
        self.fenced = self.waits

    def barrier(self) -> None:
        self.barriers += 1

    # Products

    def multiply(self, a: Any, b: "Tile", sums: Any, is_async: bool) -> "Sum":
        assert is_async
        assert b.arrived_at <= self.fenced, "no fence between a copy and the product"
        if isinstance(sums, Sum) and not sums.done:
            assert sums is self.products[-1] or sums in self.products
        product = Sum(a, b, sums)
        self.products.append(product)
        return product

    def wait_for_products(self, pending: int, deps: Any) -> Any:
        while len(self.products) > pending:
            self.products.pop(0).finish(self.barriers)
        self.overlapped = max(self.overlapped, len(self.products))
        return deps[0] if len(deps) == 1 else tuple(deps)


class Tile:
    """A tile in shared memory, or a view of it."""

    def __init__(self, dtype: torch.dtype, shape: list[int]) -> None:
        self.numbers = torch.full(shape, torch.nan).to(dtype)
        self.shape, self.read_at, self.arrived_at, self.across = shape, -1, 0, False
        self.machine: Machine

    def permute(self, order: tuple[int, int]) -> "Tile":
        assert order == (1, 0)
        return types.SimpleNamespace(  # pyright: ignore[reportReturnType]
            numbers=self.numbers.T,
            load=lambda layout: self.load(layout).T,
            tile=self,
            arrived_at=self.arrived_at,
        )

    def load(self, layout: None) -> torch.Tensor:
        self.read_at = self.machine.barriers
        return self.numbers.clone()


class Ring:
    """Several tiles."""

    def __init__(self, machine: Machine, dtype: torch.dtype, shape: list[int]) -> None:
        self.shape = shape
        self.tiles = [Tile(dtype, shape[1:]) for _ in range(shape[0])]
        for tile in self.tiles:
            tile.machine = machine

    def index(self, index: Any) -> Tile:
        return self.tiles[int(index)]


class Sum:
    """An accumulator: nobody may read it before the product is done."""

    def __init__(self, a: torch.Tensor, b: Any, sums: Any) -> None:
        self.a, self.b, self.sums, self.done = a, b, sums, False
        self.started_with = b.numbers.clone()
        self.tiles = [getattr(b, "tile", b)]
        self.numbers: Any = None

    def finish(self, barriers: int) -> None:
        assert torch.equal(self.b.numbers, self.started_with), "a tile changed under a product"
        before = self.sums.read() if isinstance(self.sums, Sum) else self.sums
        self.numbers = before + self.a.float() @ self.b.numbers.float()
        self.tiles[0].read_at = barriers
        self.done = True

    def read(self) -> torch.Tensor:
        assert self.done, "sums are read while a product goes on"
        return self.numbers

    def to(self, dtype: torch.dtype) -> torch.Tensor:
        return self.read().to(dtype)

    @property
    def shape(self) -> torch.Size:
        return self.read().shape


class Pointer:
    """To numbers of a tensor."""

    def __init__(self, tensor: torch.Tensor, offset: Any = 0) -> None:
        self.tensor, self.offset = tensor, offset
        self.dtype = types.SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.tensor, self.offset + offset)

    def load(self, mask: Any = None, other: float = 0.0) -> torch.Tensor:
        offset = torch.as_tensor(self.offset)
        mask = torch.ones(offset.shape, dtype=torch.bool) if mask is None else mask
        offset, mask = torch.broadcast_tensors(offset, mask)
        found = self.tensor.flatten()[torch.where(mask, offset, 0)]
        return torch.where(mask, found, torch.tensor(other, dtype=found.dtype))

    def store(self, numbers: torch.Tensor, mask: torch.Tensor) -> None:
        offset, mask = torch.broadcast_tensors(self.offset, mask)
        self.tensor.view(-1)[offset[mask]] = numbers[mask]


def tensor(value: Any) -> Any:
    return value.read() if isinstance(value, Sum) else torch.as_tensor(value)


def language(machine: Machine) -> types.SimpleNamespace:
    """What Gluon and Triton call `gl` and `tl`."""
    nothing = lambda *shape, **options: None  # noqa: E731
    return types.SimpleNamespace(
        **dict.fromkeys(("SliceLayout", "DotOperandLayout", "BlockedLayout"), nothing),
        NVMMASharedLayout=types.SimpleNamespace(get_default_for=nothing),
        PropagateNan=types.SimpleNamespace(ALL="all"),
        float32=torch.float32,
        int64=torch.int64,
        constexpr=Any,
        static_range=range,
        num_warps=lambda: 4,
        barrier=machine.barrier,
        program_id=lambda axis: torch.tensor(machine.place[axis]),
        cdiv=lambda a, b: -(-a // b),
        arange=lambda start, end, layout: torch.arange(start, end),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        allocate_shared_memory=lambda dtype, shape, layout: Ring(machine, dtype, shape),
        convert_layout=lambda value, layout, assert_trivial: value,
        reshape=lambda value, shape: tensor(value).reshape(shape),
        permute=lambda value, order: value.permute(order),
        split=lambda value: value.unbind(-1),
        inline_asm_elementwise=lambda asm, constraints, arguments, **options: arguments[0],
        load=lambda pointer, mask=None, other=0.0: pointer.load(mask, other),
        store=lambda pointer, value, mask: pointer.store(tensor(value), mask),
        where=lambda choice, a, b: torch.where(torch.as_tensor(choice), a, b),
        minimum=lambda a, b: torch.minimum(*torch.broadcast_tensors(tensor(a), tensor(b))),
        maximum=lambda a, b, propagate_nan=None: torch.maximum(
            *torch.broadcast_tensors(tensor(a), tensor(b))
        ),
        exp=torch.exp,
        abs=torch.abs,
    )


def as_python(value: Any, names: dict[str, Any]) -> Any:
    """A jitted function as Python, where names mean what `names` says."""
    code = value.fn
    code = getattr(code, "fn", code)
    return types.FunctionType(code.__code__, names, code.__name__, code.__defaults__)


def run(launch: Any, config: Any) -> Machine:
    """What a launch computes, in one configuration. Returns the last program's machine."""
    from kanlm.kan.kernels import triton_formulas, triton_hopper

    machine = Machine()
    names: dict[str, Any] = {}
    for module in (triton_formulas, triton_hopper):
        for name, value in vars(module).items():
            if hasattr(value, "fn") and hasattr(value.fn, "__code__"):
                names[name] = as_python(value, names)
    simulated = language(machine)
    names |= {"gl": simulated, "tl": simulated, "min": min, "len": len, "range": range}
    names |= dict.fromkeys(("_copied", "_product", "_values"), lambda *about: None)
    names["async_copy"] = types.SimpleNamespace(
        async_copy_global_to_shared=machine.copy,
        commit_group=machine.commit,
        wait_group=machine.wait_for_copies,
    )
    names["fence_async_shared"] = machine.fence
    names["warpgroup_mma"] = machine.multiply
    names["warpgroup_mma_wait"] = machine.wait_for_products
    names["int"] = int
    arguments = [
        Pointer(each) if isinstance(each, torch.Tensor) else each for each in launch.arguments
    ]
    constants = launch.constants | config.kwargs
    for name in ("START", "STEP"):
        constants[name] = as_python(constants[name], names)
    kernel = as_python(launch.kernel, names)
    for place in itertools.product(*map(range, (*launch.grid(config.kwargs), 1)[:2])):
        machine.__init__()
        machine.place = place
        kernel(*arguments, **constants)
        assert not machine.products
        assert not any(machine.groups)
    return machine


@pytest.fixture
def launches(monkeypatch):
    """What would be launched on an H100."""
    from kanlm.kan.kernels import triton_kernels, triton_launches

    monkeypatch.setattr(triton_kernels, "INTERPRETED", False)
    monkeypatch.setattr(triton_launches, "_products", lambda dtype: dtype)
    return triton_launches


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


#: Tokens, inputs and outputs that no tile divides.
SHAPE = (150, 72, 280)


@pytest.mark.parametrize(
    ("basis", "base"),
    [
        (Hermite(degree=3), "none"),
        (Hermite(degree=1), "none"),
        (Chebyshev(degree=4), "none"),
        (Legendre(degree=2, constant=True, outside="linear"), "identity"),
        (BSpline(grid_size=6), "silu"),
        (BSpline(grid_size=6, degree=3), "silu"),
    ],
    ids=lambda value: getattr(value, "label", value),
)
@pytest.mark.parametrize(
    ("of_x", "of_products", "most"),
    [
        (torch.bfloat16, torch.bfloat16, 2**-8),
        (torch.float32, torch.float16, 2**-11),
        # The machine here multiplies all of its digits.
        (torch.float32, torch.float32, 2**-18),
    ],
)
def test_every_configuration_computes_the_layer(
    launches, basis, base, of_x, of_products, most
) -> None:
    """Each product to its rounding, against float64, without a race in sight."""
    tokens, inputs, outputs = SHAPE
    functions = basis.num_functions + (base != "none")
    x, dy = draw(tokens, inputs, dtype=of_x), draw(tokens, outputs, dtype=of_products, seed=1)
    c = draw(inputs, functions, outputs, dtype=of_products, seed=2)
    exact = x.double().requires_grad_()
    values = basis.values(exact)
    if base != "none":
        last = torch.nn.functional.silu(exact) if base == "silu" else exact
        values = torch.cat([values, last.unsqueeze(-1)], dim=-1)
    expected = torch.einsum("nib,ibo->no", values, c.double())
    (expected_dx,) = torch.autograd.grad(expected, exact, dy.double(), retain_graph=True)
    expected_dc = torch.einsum("nib,no->ibo", values, dy.double())
    formula = fused.triton_formula(basis)
    assert formula is not None
    rest = (formula.name, tuple(formula.numbers), formula.knots, base)
    target = launches.Target(launches.HOPPER, 132, 227 * 1024)
    prepared = [
        (launches.sums(x, c, *rest, target), expected),
        (launches.input_gradients(dy, x, c, *rest, target), expected_dx),
        (launches.coefficient_gradients(dy, x, functions, *rest, target), expected_dc),
    ]
    if of_products == torch.float32:
        # Left to Triton.
        del prepared[1]
    for (result, launch), wanted in prepared:
        assert launch.kernel.fn.__module__.endswith("triton_hopper")
        for config in launch.configs:
            result.fill_(torch.nan)
            machine = run(launch, config)
            got = (result.sum(dim=0) if result.ndim == 4 else result).double()
            error = (got - wanted).norm() / wanted.norm()
            assert error < most, (launch.kernel, config)
            assert machine.overlapped >= 1
