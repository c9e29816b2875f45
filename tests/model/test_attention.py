"""Rotation against transformers' Llama and float64, and in which dtype what comes of it stays."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.model.attention import rotary_angles, rotate


def llamas(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """With transformers' angles: of the first half, the sines are not negated there."""
    half = x.shape[-1] // 2
    sines = torch.cat((sines[..., half:], sines[..., half:]), dim=-1)
    rotated, _ = apply_rotary_pos_emb(x, x, cosines.squeeze(1), sines.squeeze(1))
    return rotated


def test_it_turns_as_llamas_do_and_rounds_bfloat16_once() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 500, 16).bfloat16()
    places = torch.arange(500).expand(2, -1)
    exact = rotate(x.double(), *rotary_angles(places, 16, 1e4, torch.float64))
    angles = rotary_angles(places, 16, 1e4, torch.bfloat16)
    assert {each.dtype for each in angles} == {torch.float32}
    torch.testing.assert_close(llamas(x.float(), *angles), exact.float(), rtol=1e-5, atol=1e-4)
    mine = rotate(x, *angles)
    assert mine.dtype == torch.bfloat16
    theirs = llamas(x, *(each.bfloat16() for each in angles))

    def error(rotated: torch.Tensor) -> float:
        return ((rotated.double() - exact).norm() / exact.norm()).item()

    # A rounding to 8 bits: 2⁻⁹/√3 of a number, at most.
    assert error(mine) < 2**-9 < error(theirs)


@pytest.mark.parametrize("narrow", ["autocast", "cast"])
@torch.no_grad()
def test_keys_are_kept_as_narrow_as_values(narrow: str) -> None:
    config = KanLMConfig(vocab_size=7, d_model=16, n_heads=2, n_layers=1, qk_norm=True)
    model = KanLMForCausalLM(config).eval()
    if narrow == "cast":
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow == "autocast"):
        cache = model(torch.zeros(1, 5, dtype=torch.long), use_cache=True).past_key_values
    (layer,) = cache.layers
    assert layer.keys.dtype == layer.values.dtype == torch.bfloat16
