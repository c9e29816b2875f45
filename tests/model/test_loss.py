"""The chunked loss against torch's own of whole logits, in float64."""

from typing import Any

import pytest
import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

from kanlm.model import KanLMConfig, KanLMForCausalLM, loss
from kanlm.model.loss import IGNORED, Head, next_token_loss

VOCAB = 53
#: The smallest chunk: 300 tokens are 128, 128 and 44.
CHUNK = 4 * VOCAB * 128
TOKENS = (3, 100)


@pytest.fixture
def chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_BYTES", CHUNK)


def make(**fields: Any) -> KanLMForCausalLM:
    torch.manual_seed(0)
    defaults = {"d_model": 16, "n_layers": 1, "n_heads": 2, "context_length": 100}
    config = KanLMConfig(**{"vocab_size": VOCAB, "feed_forward": "gelu", **defaults, **fields})
    return KanLMForCausalLM(config).double().train()


def tokens(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids, and labels of which some are left out: all of a chunk's last ones, too."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, TOKENS, generator=draw)
    labels = torch.randint(VOCAB, TOKENS, generator=draw)
    labels[torch.rand(TOKENS, generator=draw) < 0.3] = IGNORED
    labels[-1, -50:] = IGNORED
    return ids, labels


def loss_and_gradients(model: Any, **inputs: Any) -> list[Tensor]:
    output = model(**inputs).loss
    return [output.detach(), *torch.autograd.grad(3 * output, list(model.parameters()))]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("items", [None, 700, torch.tensor(700)])
@pytest.mark.parametrize("name", ["labels", "shift_labels"])
def test_the_loss_and_all_gradients_are_those_of_whole_logits(
    monkeypatch: pytest.MonkeyPatch, tied: bool, items: Any, name: str
) -> None:
    model = make(tie_embeddings=tied)
    ids, labels = tokens()
    given = {"input_ids": ids, name: labels, "num_items_in_batch": items}
    whole = loss_and_gradients(model, **given, skip_logits=False)
    monkeypatch.setattr(loss, "CHUNK_BYTES", CHUNK)
    for mine, theirs in zip(loss_and_gradients(model, **given), whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)
    logits = model(ids).logits
    expected = ForCausalLMLoss(
        logits, labels, VOCAB, items, shift_labels=labels if name == "shift_labels" else None
    )
    torch.testing.assert_close(whole[0].float(), expected)


@pytest.mark.usefixtures("chunked")
@given(count=st.integers(1, 400), width=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_any_number_of_tokens(count: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    head = Head(width, VOCAB).double()
    x = torch.randn(count, width, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(VOCAB, (count,))
    labels[1:][torch.rand(count - 1) < 0.5] = IGNORED
    mine = head(x, labels)
    theirs = F.cross_entropy(F.linear(x, head.weight), labels)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)
    found = (torch.autograd.grad(each, (x, head.weight)) for each in (mine, theirs))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


@pytest.mark.usefixtures("chunked")
def test_gradients_can_be_differentiated_again() -> None:
    torch.manual_seed(0)
    head = Head(4, VOCAB).double()
    x = torch.randn(140, 4, dtype=torch.float64)
    labels = torch.randint(VOCAB, (140,))
    labels[:9] = IGNORED

    def chunked_loss(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(head, {"weight": weight}, (x, labels))

    def curvature(function: Any) -> Tensor:
        inputs = x.clone().requires_grad_(), head.weight
        gradients = torch.autograd.grad(function(*inputs), inputs, create_graph=True)
        squares = torch.stack([each.square().sum() for each in gradients]).sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(squares, inputs)])

    expected = curvature(lambda x, weight: F.cross_entropy(x @ weight.T, labels))
    torch.testing.assert_close(curvature(chunked_loss), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.usefixtures("chunked")
def test_backward_may_be_asked_for_twice_and_for_one_part() -> None:
    head = Head(4, VOCAB).double()
    x, labels = torch.randn(140, 4, dtype=torch.float64), torch.randint(VOCAB, (140,))
    value = head(x, labels)
    (first,) = torch.autograd.grad(value, head.weight, retain_graph=True)
    (second,) = torch.autograd.grad(2 * value, head.weight)
    torch.testing.assert_close(2 * first, second)
    head.requires_grad_(False)
    inputs = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(head(inputs, labels), inputs)
    (wanted,) = torch.autograd.grad(F.cross_entropy(head(inputs), labels), inputs)
    torch.testing.assert_close(found, wanted)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("label", [VOCAB, -1])
def test_a_label_that_is_no_token_is_refused(label: int) -> None:
    labels = torch.zeros(140, dtype=torch.long)
    labels[130] = label
    with pytest.raises((RuntimeError, IndexError)):
        Head(4, VOCAB)(torch.randn(140, 4), labels)


@pytest.mark.usefixtures("chunked")
def test_without_any_label_the_loss_is_not_a_number_as_everywhere() -> None:
    labels = torch.full((140,), IGNORED)
    assert Head(4, VOCAB)(torch.randn(140, 4), labels).isnan()


@pytest.mark.parametrize("dtype", ["autocast", "cast"])
def test_in_bfloat16_it_is_as_near_to_the_truth_as_whole_logits(
    monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    torch.manual_seed(0)
    exact = Head(64, VOCAB).double()
    x = torch.randn(640, 64, dtype=torch.float64)
    labels = torch.randint(VOCAB, (640,))

    def run(head: Head, x: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.float32):
            value = head(x, labels, 1000)
        return [value, *torch.autograd.grad(value, (x, head.weight))]

    wanted = run(exact, x)
    narrow = torch.float32 if dtype == "autocast" else torch.bfloat16
    rough = Head(64, VOCAB).to(narrow)
    rough.load_state_dict(exact.state_dict())
    errors = []
    for size in (2**28, CHUNK):
        monkeypatch.setattr(loss, "CHUNK_BYTES", size)
        found = run(rough, x.to(narrow))
        assert [each.dtype for each in found] == [torch.float32, narrow, narrow]
        errors.append([(a - b).norm() / b.norm() for a, b in zip(found, wanted, strict=True)])
    for whole, parts in zip(*errors, strict=True):
        assert parts < 1.2 * whole + 1e-6


@pytest.mark.usefixtures("chunked")
def test_compiled_without_a_break_it_computes_the_same() -> None:
    model = make()
    ids, labels = tokens()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = [
        loss_and_gradients(each, input_ids=ids, shift_labels=labels) for each in (model, compiled)
    ]
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-12)


class Largest(TorchDispatchMode):
    """The most elements of any tensor of a dtype that an operator makes."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.elements = dtype, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.dtype == self.dtype:
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_logits_are_never_whole_in_float32(precision: torch.dtype) -> None:
    model = make(d_model=8, feed_forward={"kind": "gelu", "hidden": 8}).float()
    ids, labels = tokens()
    with (
        Largest(torch.float32) as seen,
        torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16),
    ):
        # As Accelerate wraps models in bfloat16.
        wrapped: Any = convert_outputs_to_fp32(model.forward)
        wrapped(input_ids=ids, shift_labels=labels).loss.backward()
        with torch.no_grad():
            model(input_ids=ids, shift_labels=labels, token_losses=True)
    assert seen.elements == 128 * VOCAB


def test_one_chunk_has_the_bits_of_whole_logits() -> None:
    model = make().float()
    ids, labels = tokens()
    for mine, theirs in zip(
        loss_and_gradients(model, input_ids=ids, labels=labels),
        loss_and_gradients(model, input_ids=ids, labels=labels, skip_logits=False),
        strict=True,
    ):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("size", [2**28, CHUNK])
def test_losses_of_tokens_are_those_of_whole_logits(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(loss, "CHUNK_BYTES", size)
    model = make().eval()
    ids, labels = tokens()
    output = model(ids, shift_labels=labels, token_losses=True)
    assert output.logits is None
    logits = model(ids).logits.flatten(0, 1)
    expected = F.cross_entropy(logits, labels.flatten(), reduction="none").view(TOKENS)
    torch.testing.assert_close(output.loss, expected, rtol=1e-12, atol=1e-13)
    last = model(ids, shift_labels=labels, token_losses=True, logits_to_keep=7).loss
    torch.testing.assert_close(last, expected[:, -7:], rtol=1e-12, atol=1e-13)


def test_who_gets_logits() -> None:
    """Where transformers' models give them, but not in training with labels, as Liger's."""
    model, (ids, labels) = make(), tokens()
    shape = (*TOKENS, VOCAB)
    assert model(ids, labels=labels).logits is None
    assert model(ids, labels=labels, skip_logits=False).logits.shape == shape
    assert model(ids).logits.shape == shape
    model.eval()
    output = model(ids, labels=labels)
    assert output.logits.shape == shape
    assert len(model(ids, labels=labels, skip_logits=True, return_dict=False)) == 1
    for asked in ("skip_logits", "token_losses"):
        with pytest.raises(ValueError, match="need labels"):
            model(ids, **{asked: True})


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("training", [True, False])
def test_another_loss_of_the_users_is_used(training: bool) -> None:
    model, (ids, labels) = make().train(training), tokens()

    def theirs(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        return logits.square().mean()

    model.loss_function = theirs
    torch.testing.assert_close(model(ids, labels=labels).loss, model(ids).logits.square().mean())


@pytest.mark.usefixtures("chunked")
def test_another_head_of_the_users_is_used() -> None:
    """As transformers puts one in where it resizes the table."""
    model, (ids, labels) = make(), tokens()
    model.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    logits = model(ids).logits
    assert logits.shape[-1] == VOCAB + 3
    value = model(ids, shift_labels=labels).loss
    torch.testing.assert_close(value, F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    losses = model(ids, shift_labels=labels, token_losses=True).loss
    torch.testing.assert_close(losses.sum() / (labels != IGNORED).sum(), value)


@pytest.mark.usefixtures("chunked")
def test_logits_in_bfloat16_are_widened_by_chunks() -> None:
    """Which also llamas may use."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    llama: Any = LlamaForCausalLM(config).bfloat16()
    ids, labels = tokens()
    expected = llama(ids, labels=labels).loss
    llama.loss_function = next_token_loss
    with torch.no_grad(), Largest(torch.float32) as seen:
        found = llama(ids, labels=labels).loss
    torch.testing.assert_close(found, expected)
    assert seen.elements == 128 * VOCAB
