"""What `decoding` prepares, what it leaves alone, and that neither changes a result."""

import copy
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from transformers import CompileConfig

from kanlm.kan import (
    BSpline,
    Hermite,
    KANLinear,
    Rational,
    cpp_build,
    decoding,
    refine_layer,
    refit_layer,
)
from kanlm.kan.kernels import use_backend
from kanlm.kan.kernels.prepared import Prepared, is_decoding, prepared_modules
from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.model.feed_forward.kan import KAN, KANGLU, KANLocal, KANSingle

pytestmark = pytest.mark.skipif(
    cpp_build.obstacle() is not None, reason=f"no native kernels: {cpp_build.obstacle()}"
)

Block = KAN | KANGLU | KANSingle


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Of prepared modules: the number of layers in each call."""
    made: list[int] = []
    call = Prepared.__call__

    def counted(self: Prepared, x: torch.Tensor) -> torch.Tensor:
        made.append(len(self._layers))
        return call(self, x)

    monkeypatch.setattr(Prepared, "__call__", counted)
    return made


def check(block: torch.nn.Module, x: torch.Tensor, tolerance: float = 1e-5) -> None:
    """The block, prepared, against itself in float64."""
    with torch.no_grad():
        with decoding(block):
            got = block(x)
        exact = copy.deepcopy(block).double()(x.double())
    assert got.dtype == x.dtype
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", [KAN, KANLocal, KANGLU, KANSingle])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 64])
def test_every_kind_of_block(kind, dtype, tokens, calls) -> None:
    block = kind(9, 21, 1.0).to(dtype)
    for name, parameter in block.named_parameters():
        if name in ("norm.weight", "up.bias"):
            torch.nn.init.normal_(parameter)
    check(block, torch.randn(tokens, 9).to(dtype), 2**-5 if dtype == torch.bfloat16 else 1e-5)
    if tokens == 1:
        assert calls == [2 if issubclass(kind, KAN) else 1]


def test_layers_in_a_row_are_those_one_by_one() -> None:
    block, x = KANLocal(9, 21, 1.0), torch.randn(2, 3, 9)
    with torch.no_grad():
        expected = block.down(block.norm(block.up(x)))
        with decoding(block):
            torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-6)


def test_weights_may_change_between_two_blocks() -> None:
    """In place, by others, onto another grid, and into another type."""
    block, x = KANLocal(5, 7, 1.0), torch.randn(3, 5)
    assert isinstance(block.up.basis, BSpline)
    check(block, x)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    check(block, x)
    block.up.basis.knots.mul_(0.5)
    check(block, x)
    block.down.coefficients = torch.nn.Parameter(torch.randn_like(block.down.coefficients))
    block.norm.weight = torch.nn.Parameter(torch.randn_like(block.norm.weight))
    check(block, x)
    block.norm.epsilon = 0.5
    block.up.base = "identity"
    check(block, x)
    refine_layer(block.up, 12)
    check(block, x)
    refit_layer(block.down, Hermite(), torch.randn(100, 7))
    check(block, x)
    block.load_state_dict({name: t.clone() for name, t in block.state_dict().items()}, assign=True)
    check(block, x)
    check(block.bfloat16(), x.bfloat16(), 0.05)


def cast(block: KANLocal) -> None:
    block.double()


def replace_data(block: KANLocal) -> None:
    for parameter in block.parameters():
        parameter.data = torch.randn_like(parameter)


def replace_layer(block: KANLocal) -> None:
    block.up = KANLinear(8, 8, basis=BSpline())


@pytest.mark.parametrize("change", [cast, replace_data, replace_layer])
def test_weights_that_are_replaced_within_a_block_stay_as_they_were(change) -> None:
    block, x = KANLocal(8, 8, 1.0), torch.randn(1, 8)
    with torch.no_grad(), decoding(block):
        expected = block(x)
        change(block)
        torch.randn(10_000)  # would be written where freed memory was
        assert torch.equal(block(x), expected)
    if change is not cast:
        check(block, x)


def test_an_error_ends_it(calls) -> None:
    block, x = KAN(8, 8, 1.0), torch.randn(1, 8)
    with torch.no_grad():
        with pytest.raises(ValueError, match="9 channels"), decoding(block):
            block(torch.randn(1, 9))
        block(x)
    assert calls == []


def test_blocks_nest(calls) -> None:
    """Of another model, and of the same one, whose weights have a hook by then."""
    block, other, x = KAN(8, 8, 1.0), KAN(8, 8, 1.0), torch.randn(1, 8)
    with torch.no_grad(), decoding(block):
        expected = block(x)
        block.up.register_forward_hook(lambda *_: None)
        with decoding(other), decoding(block):
            other(x)
            assert calls == [2, 2]
            torch.testing.assert_close(block(x), expected)
            assert calls == [2, 2, 1, 1]  # layer by layer
        assert torch.equal(block(x), expected)
        other(x)
    assert calls == [2, 2, 1, 1, 2]
    assert not is_decoding()


def test_another_thread_goes_the_ordinary_way(calls) -> None:
    block, x = KAN(8, 8, 1.0), torch.randn(1, 8)

    def compute() -> None:
        with torch.no_grad():
            block(x)

    with torch.no_grad(), decoding(block):
        thread = threading.Thread(target=compute)
        thread.start()
        thread.join()
        assert calls == []
        block(x)
    assert calls == [2]


@pytest.mark.parametrize("name", ["up", "norm", "down"])
def test_a_layer_with_a_hook_is_called(name) -> None:
    block, called = KANLocal(5, 7, 1.0), []
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        handle = getattr(block.get_submodule(name), register)(lambda *_: called.append(name))
        check(block, torch.randn(1, 5))
        handle.remove()
    # Once in float64.
    assert called == [name] * 4


class Twice(torch.nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


class Adapted(KANLinear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x.sum(-1, keepdim=True)


class Halved(KANLocal):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 2


def compute_coefficients(block: KANLocal) -> None:
    """Anew at every look."""
    torch.nn.utils.parametrize.register_parametrization(block.up, "coefficients", Twice())


def hold_coefficients_in_an_attribute(block: KANLocal) -> None:
    """As FSDP does with views of its flat parameter."""
    coefficients: Any = block.up.coefficients.detach()
    del block.up.coefficients
    block.up.coefficients = coefficients


def adapt_up(block: KANLocal) -> None:
    block.up = Adapted(8, 8, basis=BSpline())


def wrap_down(block: KANLocal) -> None:
    block.add_module("down", torch.nn.Sequential(block.down, torch.nn.Tanh()))


def replace_inner_norm(block: KANLocal) -> None:
    block.add_module("norm", torch.nn.LayerNorm(8))


def doubled(layer: KANLinear, x: torch.Tensor) -> torch.Tensor:
    return 2 * KANLinear.forward(layer, x)


def replace_forward(block: KANLocal) -> None:
    block.up.forward = types.MethodType(doubled, block.up)


def derive_block(block: KANLocal) -> None:
    block.__class__ = Halved


def transpose_weights(block: KANLocal) -> None:
    assert block.up.base_weight is not None
    block.up.base_weight.data = block.up.base_weight.data.t()


def free_knots(block: KANLocal) -> None:
    basis = BSpline(equal_cells=False)
    basis.knots[0, 3] += 0.4
    block.up.basis = basis


def learn_the_basis(block: KANLocal) -> None:
    block.up = KANLinear(8, 8, basis=Rational(8))


@pytest.mark.parametrize(
    "change",
    [
        compute_coefficients,
        adapt_up,
        wrap_down,
        replace_inner_norm,
        replace_forward,
        derive_block,
        transpose_weights,
        free_knots,
        learn_the_basis,
    ],
)
def test_what_is_more_than_its_weights_say_computes_as_ever(change: Callable) -> None:
    block = KANLocal(8, 8, 1.0)
    change(block)
    for tokens in (1, 3):
        check(block, torch.randn(tokens, 8))


def test_weights_in_an_attribute_may_be_others_at_every_call() -> None:
    block, x = KANLocal(8, 8, 1.0), torch.randn(3, 8)
    hold_coefficients_in_an_attribute(block)
    with torch.no_grad(), decoding(block):
        for _ in range(2):
            got = block(x)
            with use_backend("reference"):
                torch.testing.assert_close(got, block(x), rtol=1e-5, atol=1e-5)
            coefficients: Any = torch.randn_like(block.up.coefficients)
            block.up.coefficients = coefficients


def test_an_offloaded_block_is_fetched_layer_by_layer() -> None:
    """Accelerate wraps each layer's `forward`, which brings its weights from elsewhere."""
    block, x = KANLocal(5, 7, 1.0), torch.randn(3, 5)
    with torch.no_grad():
        expected = block(x)
        cpu_offload(block, execution_device=torch.device("cpu"))
        with decoding(block):
            torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=2e-6)


def test_whoever_needs_torchs_operators_has_them(calls) -> None:
    """Gradients, transforms, autocast, many tokens, and a backend that was asked for."""
    block, x = KAN(8, 8, 1.0), torch.randn(2, 8)
    with decoding(block):
        assert block(x).requires_grad
        with torch.no_grad():
            torch.vmap(block)(x)
            block(torch.randn(65, 8))
            block(x[:0])
            with torch.autocast("cpu", torch.bfloat16):
                block(x)
            with use_backend("reference"):
                block(x)
    assert calls == []


@pytest.mark.parametrize("channels", [0, 4, 12])
def test_inputs_of_another_width_are_refused(channels) -> None:
    """More of them would be written past the outputs' end."""
    block = KANLocal(8, 8, 1.0)
    message = f"{channels} channels: expected 8"
    with torch.no_grad(), decoding(block), pytest.raises(ValueError, match=message):
        block(torch.ones(1, channels))


def test_weights_that_do_not_fit_are_refused() -> None:
    block = KANLocal(8, 8, 1.0)
    block.norm.weight = torch.nn.Parameter(torch.randn(3))
    with pytest.raises(ValueError, match=r"weights of shape \(3,\): expected \(8,\)"):
        decoding(block).__enter__()


def test_a_copy_of_a_block_within_is_prepared_by_nobody(calls) -> None:
    block, x = KAN(8, 8, 1.0), torch.randn(1, 8)
    with torch.no_grad(), decoding(block):
        copied = copy.deepcopy(block)
        copied.up.coefficients.mul_(2)
        with use_backend("reference"):
            expected = copied(x)
        torch.testing.assert_close(copied(x), expected, rtol=1e-5, atol=1e-5)
    assert calls == []


def tiny(feed_forward: dict[str, Any], **options: Any) -> KanLMForCausalLM:
    torch.manual_seed(0)
    config = KanLMConfig(
        vocab_size=50, d_model=16, n_layers=2, n_heads=2, feed_forward=feed_forward, **options
    )
    return KanLMForCausalLM(config).eval()


KINDS = [
    {"kind": "kan"},
    {"kind": "kan-local"},
    {"kind": "kan-glu"},
    {"kind": "kan-single"},
    {"kind": "conv-kan"},
    {"kind": "moe", "num_experts": 2},
    {"kind": "kan", "basis": {"kind": "rational"}},
]
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind["kind"])
@pytest.mark.parametrize("mode", MODES)
def test_generate_gives_the_tokens_of_the_ordinary_way(kind, mode, calls) -> None:
    spec = kind if kind["kind"] == "kan-single" else {**kind, "hidden": 24}
    model = tiny(spec)
    prompt = torch.randint(50, (2, 5))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **MODES[mode]}
    got = model.generate(prompt, **options)
    assert calls or "basis" in kind
    before = len(calls)
    with use_backend("reference"):
        assert torch.equal(model.generate(prompt, **options), got)
    assert len(calls) == before
    assert not prepared_modules()


def test_generate_with_an_assistant(calls) -> None:
    model, assistant = tiny({"kind": "kan", "hidden": 24}), tiny({"kind": "kan-local", "hidden": 8})
    prompt = torch.randint(50, (1, 5))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(prompt, **options)
    assert torch.equal(model.generate(prompt, assistant_model=assistant, **options), expected)
    assert calls


def test_generate_sees_weights_that_changed() -> None:
    model, prompt = tiny({"kind": "kan", "hidden": 24}), torch.randint(50, (1, 5))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    model.generate(prompt, **options)
    torch.nn.init.normal_(model.model.layers[0].feed_forward.up.coefficients)  # pyright: ignore
    got = model.generate(prompt, **options)
    with use_backend("reference"):
        assert torch.equal(model.generate(prompt, **options), got)


class Counted:
    """A backend of torch.compile that counts what it is given, and how often it runs."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any, **options: Any) -> Callable:
        self.graphs.append(graph)

        def run(*arguments: Any) -> Any:
            self.runs += 1
            return graph(*arguments)

        return run

    def __deepcopy__(self, memo: Any) -> "Counted":
        return self  # transformers copies what it compiles with

    def operators(self) -> int:
        """Calls of the operator that reads sparsely, in the graph compiled last."""
        return sum("few_tokens" in str(node.target) for node in self.graphs[-1].graph.nodes)


@pytest.mark.parametrize("kind", [*KINDS[:4], KINDS[-1]], ids=lambda kind: str(kind))
def test_a_compiled_step_reads_sparsely_and_is_compiled_once(kind) -> None:
    """The step that transformers compiles for a static cache: the eager tokens, one graph for all
    of them, and in it the operator for every layer."""
    spec = kind if kind["kind"] == "kan-single" else {**kind, "hidden": 24}
    model, counted = tiny(spec), Counted()
    prompts = [torch.randint(50, (1, 5)) for _ in range(2)]
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = [model.generate(prompt, **options) for prompt in prompts]
    # As on a GPU, where transformers compiles by itself.
    compiled = CompileConfig(fullgraph=True, backend=counted)  # pyright: ignore[reportArgumentType]
    compiled._compile_all_devices = True  # pyright: ignore[reportAttributeAccessIssue]
    options |= {"cache_implementation": "static", "compile_config": compiled}
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert torch.equal(model.generate(prompt, **options), tokens)
    assert len(counted.graphs) == 1
    assert counted.runs == 2 * 11
    layers = [module for module in model.modules() if isinstance(module, KANLinear)]
    assert counted.operators() == len(layers)


def test_code_compiled_outside_reads_as_ever() -> None:
    """And within `decoding` it is compiled again, once."""
    block, x, counted = KANLocal(8, 8, 1.0), torch.randn(1, 8), Counted()
    compiled = torch.compile(block, backend=counted)
    with torch.no_grad():
        expected = compiled(x)
        assert counted.operators() == 0
        for _ in range(2):
            with decoding(block):
                torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
                assert counted.operators() == 2
            compiled(x)
    assert len(counted.graphs) == 2
