"""The causal convolution against torch's conv1d, and whole models of it run piece by piece."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache

from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.model.feed_forward import ConvKAN, make_feed_forward
from kanlm.model.feed_forward.base import Context
from kanlm.model.feed_forward.convolution import CausalConvolution
from kanlm.model.matching import solve_hidden

VOCAB = 53


def convolution(channels: int = 6, kernel_size: int = 4) -> CausalConvolution:
    torch.manual_seed(0)
    layer = CausalConvolution(channels, kernel_size)
    torch.nn.init.normal_(layer.weight)
    return layer.double()


def conv1d(layer: CausalConvolution, x: torch.Tensor) -> torch.Tensor:
    padded = F.pad(x.transpose(-1, -2), (layer.kernel_size - 1, 0))
    return F.conv1d(padded, layer.weight, groups=x.shape[-1]).transpose(-1, -2)


def make(**options: Any) -> KanLMForCausalLM:
    """A small model whose kernels reach as strongly back as at the token itself."""
    torch.manual_seed(0)
    config = KanLMConfig(
        vocab_size=VOCAB,
        d_model=32,
        n_layers=2,
        n_heads=4,
        context_length=24,
        feed_forward={"kind": "conv-kan", **options},
    )
    model = KanLMForCausalLM(config).eval()
    for module in model.modules():
        if isinstance(module, CausalConvolution):
            torch.nn.init.normal_(module.weight)
    return model


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, prompt: torch.Tensor, **options: Any) -> torch.Tensor:
    defaults = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}
    options = {"attention_mask": torch.ones_like(prompt), **options}
    return model.generate(prompt, **{**defaults, **options})


@pytest.mark.parametrize("kernel_size", [1, 2, 4, 7])
@pytest.mark.parametrize("length", [1, 3, 12])
def test_it_is_conv1d(kernel_size: int, length: int) -> None:
    layer = convolution(kernel_size=kernel_size)
    x = torch.randn(3, length, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), conv1d(layer, x))
    torch.testing.assert_close(layer(x[0]), conv1d(layer, x[:1])[0])


def test_a_token_reaches_as_far_as_the_kernel() -> None:
    layer = convolution(kernel_size=3)
    x = torch.randn(1, 8, 6, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    for t in range(8):
        (gradient,) = torch.autograd.grad(y[0, t].sum(), x, retain_graph=True)
        reached = (gradient[0] != 0).any(-1).tolist()
        assert reached == [t - 2 <= place <= t for place in range(8)]


def test_documents_and_padding_count_as_zeros() -> None:
    layer = convolution()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    documents = torch.tensor([[0] * 4 + [1] + [2] * 4, [0] * 9])
    apart = torch.cat([conv1d(layer, part) for part in x[:1].split([4, 1, 4], dim=1)], dim=1)
    expected = torch.cat([apart, conv1d(layer, x[1:])])
    torch.testing.assert_close(layer(x, Context(layer=0, documents=documents)), expected)

    present = torch.tensor([[False] * 2 + [True] * 7, [True] * 9])
    found = layer(x, Context(layer=0, present=present))
    torch.testing.assert_close(found[0, 2:], conv1d(layer, x[:1, 2:])[0])
    torch.testing.assert_close(found[1], conv1d(layer, x[1:])[0])


@pytest.mark.parametrize("parts", [[1] * 9, [9], [2, 1, 5, 1], [5, 4]])
def test_pieces_with_a_cache_are_one_pass(parts: list[int]) -> None:
    """Prompts shorter than the kernel, and continuations of several tokens, included."""
    model = make()
    x = torch.randn(2, 9, 32)
    layer = model.get_submodule("model.layers.1.feed_forward.convolution")
    assert isinstance(layer, CausalConvolution)
    cache = DynamicCache(config=model.config)
    context = Context(layer=1, past_key_values=cache)
    found = torch.cat([layer(part, context) for part in x.split(parts, dim=1)], dim=1)
    torch.testing.assert_close(found, conv1d(layer, x))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("length", [1, 2, 8])
@pytest.mark.parametrize("kernel_size", [2, 5])
def test_cached_generation_equals_uncached(batch: int, length: int, kernel_size: int) -> None:
    model = make(kernel_size=kernel_size)
    prompt = tokens(batch, length)
    mask = torch.ones_like(prompt)
    mask[-1, : length // 2] = 0
    uncached = generate(model, prompt, attention_mask=mask, use_cache=False)
    assert torch.equal(generate(model, prompt, attention_mask=mask), uncached)
    static = generate(model, prompt, attention_mask=mask, cache_implementation="static")
    assert torch.equal(static, uncached)
    # The padded row says what its tokens alone do.
    alone = generate(model, prompt[-1:, length // 2 :])
    assert torch.equal(uncached[-1:, length // 2 :], alone)


def test_beams_and_drafts_find_the_convolutions_inputs_again() -> None:
    model = make()
    prompt = tokens(1, 8).repeat(1, 2)
    beams = {"num_beams": 4, "max_new_tokens": 10}
    assert torch.equal(
        generate(model, prompt, **beams), generate(model, prompt, use_cache=False, **beams)
    )
    # Drafts that are repeated from the prompt are mostly wrong, and taken back.
    drafted = generate(model, prompt, prompt_lookup_num_tokens=4)
    assert torch.equal(drafted, generate(model, prompt, use_cache=False))


def test_a_cache_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match=r"DynamicCache\(config=model.config\)"):
        make()(tokens(1, 5), past_key_values=DynamicCache(), use_cache=True)


def test_a_mask_that_hides_the_padding_is_refused() -> None:
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="attention_mask has 4 dimensions"):
        make()(tokens(1, 5), attention_mask=mask)


def test_saved_and_loaded_it_generates_the_same(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = tokens(2, 20)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(generate(loaded, ids[:, :5]), generate(model, ids[:, :5]))


@pytest.mark.parametrize("width", [16, 64, 256])
@pytest.mark.parametrize("block", ["kan-local", "swiglu"])
def test_starts_near_the_identity_with_the_variance_asked_for(width: int, block: str) -> None:
    torch.manual_seed(0)
    spec = {"kind": "conv-kan", "block": {"kind": block}}
    hidden = solve_hidden(spec, width, parameters=8 * width**2)
    layer = make_feed_forward({**spec, "hidden": hidden}, width, output_scale=0.5)
    assert isinstance(layer, ConvKAN)
    squares, convolved, products = [], [], []
    for _ in range(max(3, 2048 // width)):
        layer.reset_parameters()
        x = F.rms_norm(torch.randn(64, width), (width,))
        with torch.no_grad():
            squares.append(layer(x).square().mean())
            # Past the first tokens, which have no neighbours before them.
            y = layer.convolution(x)[3:]
        convolved.append(y.square().mean())
        products.append((y * x[3:]).mean())
    assert torch.stack(squares).mean().item() == pytest.approx(0.25, rel=0.1)
    assert torch.stack(convolved).mean().item() == pytest.approx(1, rel=0.05)
    assert torch.stack(products).mean().item() == pytest.approx(0.9**0.5, rel=0.05)


def test_labels_and_refusals() -> None:
    spec = {"kind": "conv-kan", "hidden": 4}
    assert make_feed_forward(spec, 8, 1.0).label == "conv4-kan/hermite3-squash"
    other = make_feed_forward({**spec, "kernel_size": 3, "block": {"kind": "gelu"}}, 8, 1.0)
    assert other.label == "conv3-gelu"
    for options, message in (
        ({"kernel_size": 0}, "kernel_size = 0"),
        ({"block": {"kind": "conv-kan"}}, "not one in another"),
        ({"block": {"kind": "kan", "hidden": 4}}, "the width is that of the block around it"),
    ):
        with pytest.raises(ValueError, match=message):
            make_feed_forward({**spec, **options}, 8, 1.0)
