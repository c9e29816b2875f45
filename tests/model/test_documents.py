"""Attention within packed documents against a dense mask, and against transformers' own."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kanlm.model import KanLMConfig, KanLMForCausalLM, documents
from kanlm.model.documents import Pieces, causal_within, document_numbers, flex_mask

HEADS, HEAD_DIM = 4, 6


def positions(rows: list[list[int]]) -> Tensor:
    """Of rows of documents of these lengths."""
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])


def attending(groups: int = 1) -> nn.Module:
    module: Any = nn.Module()
    module.is_causal, module.num_key_value_groups = True, groups
    return module


def inputs(numbers: Tensor, groups: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    rows, length = numbers.shape
    torch.manual_seed(0)

    def draw(heads: int) -> Tensor:
        drawn = torch.randn(rows, length, heads, HEAD_DIM, dtype=torch.float64)
        return drawn.transpose(1, 2).requires_grad_()

    return draw(HEADS), draw(HEADS // groups), draw(HEADS // groups)


def with_gradients(output: Tensor, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), tensors)]


@given(
    rows=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=7), min_size=1, max_size=3),
    groups=st.sampled_from([1, 2, 4]),
    piece=st.sampled_from([1, 4, 64]),
)
@settings(max_examples=60, deadline=None)
def test_pieces_attend_as_a_dense_mask_makes_them(
    rows: list[list[int]], groups: int, piece: int
) -> None:
    length = max(map(sum, rows))
    filled = [[*row, *[1] * (length - sum(row))] for row in rows]
    numbers = document_numbers(positions(filled))
    tensors, module = inputs(numbers, groups), attending(groups)
    dense, _ = sdpa_attention_forward(module, *tensors, causal_within(numbers), scaling=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE", piece)
        pieces = Pieces(numbers)
        mine, _ = pieces.attend(module, *tensors, pieces, scaling=0.5)
    assert sum(size for size, _ in pieces.pieces or [(numbers.numel(), None)]) == numbers.numel()
    torch.testing.assert_close(
        with_gradients(mine, tensors), with_gradients(dense, tensors), rtol=1e-12, atol=1e-12
    )


def test_long_documents_are_alone_and_short_ones_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE", 4)
    numbers = document_numbers(positions([[2, 1, 5, 3, 3, 1, 1], [4, 4, 1, 1, 6, 0, 0]]))
    found = Pieces(numbers).pieces
    assert found is not None
    # Of the first row 2 + 1, 5, 3 + 3, 1 + 1; of the second 4, 4, 1 + 1, 6.
    assert [size for size, _ in found] == [3, 5, 6, 2, 4, 4, 2, 6]
    assert [mask is None for _, mask in found] == [
        False,
        True,
        False,
        False,
        True,
        True,
        False,
        True,
    ]
    assert Pieces(document_numbers(positions([[7], [7]]))).pieces is None


def test_the_mask_is_that_of_transformers() -> None:
    given = positions([[3, 4, 1], [8], [1, 1, 6]])
    config = KanLMConfig(vocab_size=5, d_model=8, n_heads=1, n_layers=1)
    config._attn_implementation = "sdpa"
    theirs = create_causal_mask(
        config=config,
        inputs_embeds=torch.zeros(3, 8, 8),
        attention_mask=None,
        past_key_values=None,
        position_ids=given,
    )
    assert isinstance(theirs, Tensor)
    assert torch.equal(causal_within(document_numbers(given)), theirs)


@pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")
@torch.no_grad()
def test_flex_attention_attends_as_a_dense_mask_makes_it() -> None:
    """Forward, in eager torch: its backward is for GPUs alone."""
    numbers = document_numbers(positions([[130, 3, 67], [1, 198, 1]]))
    query, key, value = (tensor.detach() for tensor in inputs(numbers, groups=2))
    dense, _ = sdpa_attention_forward(
        attending(groups=2), query, key, value, causal_within(numbers), scaling=0.5
    )
    mask = flex_mask(numbers)
    mine: Any = flex_attention(query, key, value, block_mask=mask, scale=0.5, enable_gqa=True)
    torch.testing.assert_close(mine.transpose(1, 2), dense, rtol=1e-12, atol=1e-12)
    # Of two by two tiles of 128, the one above the diagonal is skipped in each row.
    assert mask.kv_num_blocks.tolist() == [[[1, 2]]] * 2
    # Of three by three, those of the second document skip the first's.
    assert flex_mask(document_numbers(positions([[128, 256]]))).kv_num_blocks.tolist() == [
        [[1, 1, 1]]
    ]


@pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")
@torch.no_grad()
def test_on_a_gpu_the_model_attends_by_flex_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose kernel transformers calls, in the place of `sdpa`."""
    model = make().eval()
    ids = torch.randint(11, PACKED.shape, generator=torch.Generator().manual_seed(0))
    expected = model(ids, position_ids=PACKED).logits
    calls = []

    def flex(module: nn.Module, *tensors: Any, scaling: float, **kwargs: Any) -> tuple[Any, None]:
        query, key, value, mask = tensors
        calls.append(type(mask))
        attended: Any = flex_attention(query, key, value, block_mask=mask, scale=scaling)
        return attended.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flex_attention", flex)
    monkeypatch.setattr(documents, "Pieces", flex_mask)
    found = model(ids, position_ids=PACKED).logits
    assert calls == [BlockMask] * 2
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "compiler", "kind"),
    [
        ("cpu", torch.float32, 64, True, "Pieces"),
        ("cuda", torch.bfloat16, 64, True, "BlockMask"),
        ("cuda", torch.float32, 16, True, "BlockMask"),
        ("cuda", torch.float64, 64, True, "Tensor"),
        ("cuda", torch.float32, 8, True, "Tensor"),
        ("cuda", torch.float32, 64, False, "Tensor"),
        ("mps", torch.float32, 64, True, "Tensor"),
    ],
)
def test_what_keeps_documents_apart_where(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    compiler: bool,
    kind: str,
) -> None:
    monkeypatch.setattr(documents, "has_triton", lambda: True)
    monkeypatch.setattr(documents, "no_c_compiler", lambda: None if compiler else "is missing")
    made = []
    monkeypatch.setattr(documents, "flex_mask", lambda *_, compiled: made.append(compiled))
    x = SimpleNamespace(device=torch.device(device), dtype=dtype)
    found = documents.within_documents(document_numbers(PACKED), cast(Tensor, x), head_dim)
    # Without a dense mask meanwhile.
    assert made == ([True] if kind == "BlockMask" else [])
    assert made or type(found).__name__ == kind


def make(**fields: Any) -> KanLMForCausalLM:
    torch.manual_seed(0)
    config = KanLMConfig(
        vocab_size=11,
        d_model=32,
        n_heads=2,
        n_layers=2,
        context_length=40,
        feed_forward=[{"kind": "gelu"}, {"kind": "conv-kan"}],
        **fields,
    )
    return KanLMForCausalLM(config).double()


PACKED = positions([[12, 1, 20, 7], [40]])


def run(model: Any, position_ids: Tensor = PACKED) -> list[Tensor]:
    ids = torch.randint(11, position_ids.shape, generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=ids, shift_labels=ids, position_ids=position_ids).loss
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def test_a_model_learns_the_same_whatever_keeps_documents_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make()
    monkeypatch.setattr(documents, "PIECE", 8)
    mine = run(model)
    monkeypatch.setattr(documents, "Pieces", causal_within)
    dense = run(model)
    torch.testing.assert_close(mine, dense, rtol=1e-11, atol=1e-12)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(run(model), dense, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_code_takes_other_documents_without_compiling_anew(whole: bool) -> None:
    torch._dynamo.reset()
    model = make().train()
    expected = [run(model), run(model, PACKED.flip(0)), run(model, positions([[40], [40]]))]
    counter = CompileCounterWithBackend("aot_eager")
    if whole:
        compiled = torch.compile(model, backend=counter, fullgraph=True)
    else:
        compiled = model
        for block in model.model.layers:
            block.compile(backend=counter, fullgraph=True)
    found = [run(compiled), run(compiled, PACKED.flip(0))]
    frames = counter.frame_count
    found.append(run(compiled, positions([[40], [40]])))
    assert counter.frame_count == frames == (1 if whole else 2)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_blocks_attend_within_documents_too(use_reentrant: bool) -> None:
    model = make().train()
    expected = run(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.testing.assert_close(run_backward(model), expected, rtol=1e-12, atol=1e-12)


def run_backward(model: KanLMForCausalLM) -> list[Any]:
    """As `run`, by the way that reentrant checkpoints know."""
    ids = torch.randint(11, PACKED.shape, generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=ids, shift_labels=ids, position_ids=PACKED).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


def test_with_padding_or_a_cache_positions_are_only_positions() -> None:
    """As transformers' models have it."""
    model = make().eval()
    ids = torch.randint(11, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    padded = model(ids, position_ids=PACKED, attention_mask=mask).logits
    model.set_attn_implementation("eager")
    eager = model(ids, position_ids=PACKED, attention_mask=mask).logits
    torch.testing.assert_close(padded[:, 5:], eager[:, 5:], rtol=1e-11, atol=1e-12)
    model.set_attn_implementation("sdpa")
    first = model(ids, position_ids=PACKED, use_cache=True)
    more = model(
        ids[:, :3], position_ids=PACKED[:, -3:] + 3, past_key_values=first.past_key_values
    ).logits
    assert first.past_key_values.get_seq_length() == 43
    assert more.shape == (2, 3, 11)
