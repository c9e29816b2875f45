"""Counts against numel of a built model and against torch's own FLOP counter."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kanlm.kan.kernels import use_backend
from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.model.accounting import account
from kanlm.model.settings import ModelSettings

VOCAB, LENGTH = 101, 32
SETTINGS = {
    "kan": ModelSettings(d_model=32, n_layers=2, context_length=LENGTH),
    "swiglu, untied, grouped": ModelSettings(
        d_model=32,
        n_layers=3,
        n_kv_heads=2,
        context_length=LENGTH,
        feed_forward={"kind": "swiglu"},
        tie_embeddings=False,
    ),
    "a kind a layer": ModelSettings(
        d_model=32,
        n_layers=4,
        qk_norm=True,
        context_length=LENGTH,
        feed_forward=[
            {"kind": "gelu"},
            {"kind": "kan", "base": None, "basis": {"kind": "bspline", "degree": 3}},
            {"kind": "swiglu", "hidden": 5},
            {"kind": "relu2"},
        ],
    ),
    "experts and convolutions": ModelSettings(
        d_model=32,
        n_layers=3,
        context_length=LENGTH,
        feed_forward=[
            {"kind": "moe", "num_experts": 4, "top_k": 2, "hidden": 7},
            {"kind": "conv-kan"},
            {
                "kind": "conv-kan",
                "kernel_size": 2,
                "block": {"kind": "moe", "experts": [{"kind": "swiglu"}], "top_k": 1},
            },
        ],
    ),
}


@pytest.fixture(params=SETTINGS.values(), ids=list(SETTINGS))
def settings(request: pytest.FixtureRequest) -> ModelSettings:
    return request.param


def test_parameters_are_numel(settings: ModelSettings) -> None:
    model = KanLMForCausalLM(KanLMConfig.from_settings(settings, VOCAB))
    counted = account(settings, VOCAB).parameters
    assert counted["total"] == sum(p.numel() for p in model.parameters())
    assert counted["total"] == sum(n for part, n in counted.items() if part != "total")
    by_name: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = next(
            part
            for part, mark in {
                "embedding": "embed_tokens",
                "attention": ".attention.",
                "feed_forward": ".feed_forward.",
                "norms": "norm",
                "head": "lm_head",
            }.items()
            if mark in name
        )
        by_name[part] = by_name.get(part, 0) + parameter.numel()
    assert {part: n for part, n in counted.items() if n and part != "total"} == by_name


def products(settings: ModelSettings, length: int) -> dict[str, float]:
    """FLOPs a token of matrix products, by module, as torch sees them happen."""
    config = KanLMConfig.from_settings(settings, VOCAB)
    # Only plain operations are seen whole.
    config._attn_implementation = "eager"
    model = KanLMForCausalLM(config).eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), use_backend("reference"):
        model(torch.zeros(1, length, dtype=torch.long), use_cache=False)
    names = {name: f"KanLMForCausalLM.{name}" for name, _ in model.named_modules() if name}
    counts = counter.get_flop_counts()
    return {
        name: sum(counts[full].values()) / length for name, full in names.items() if full in counts
    }


def test_matrix_flops_are_those_torch_counts(settings: ModelSettings) -> None:
    """Elementwise operations come on top; torch does not count them."""
    counted = account(settings, VOCAB).flops_per_token
    seen = products(settings, LENGTH)

    def total(part: str) -> float:
        return sum(seen[f"model.layers.{layer}.{part}"] for layer in range(settings.n_layers))

    assert counted["head"] == seen["lm_head"]
    channels = settings.n_layers * 2 * 132
    assert 0 < counted["feed_forward"] - total("feed_forward") < 60 * channels
    attention = counted["attention"] + counted["attention_scores"]
    assert 0 < attention - total("attention") < 10 * channels
    assert counted["total"] == sum(n for part, n in counted.items() if part != "total")
    # The context's length enters by the scores alone, and there exactly.
    shorter = dataclasses.replace(settings, context_length=LENGTH // 2)
    gained = counted["total"] - account(shorter, VOCAB).flops_per_token["total"]
    assert gained == sum(
        seen[name] - n for name, n in products(settings, LENGTH // 2).items() if name == "model"
    )


def test_elementwise_flops_are_a_small_part_at_real_widths() -> None:
    for kind in ("gelu", "relu2", "swiglu", "kan", "moe", "conv-kan"):
        settings = ModelSettings(d_model=256, feed_forward={"kind": kind})
        flops = account(settings, VOCAB).flops_per_token["feed_forward"]
        # Of 8 experts, a token is sent to 2, which are narrow.
        active, part = (1 / 4, 0.1) if kind == "moe" else (1, 0.05)
        products = active * 4 * 2 * 8 * 256**2
        assert products * 0.99 < flops < products * (1 + part)


def test_decoding_reads_all_weights_but_the_other_embeddings() -> None:
    tied = account(SETTINGS["kan"], VOCAB)
    # The head reads the whole matrix that the embedding reads a row of.
    assert tied.decoded_parameters == tied.parameters["total"] + 32
    assert tied.bytes_per_decoded_token() == 4 * tied.decoded_parameters
    assert tied.bytes_per_decoded_token(torch.bfloat16) == 2 * tied.decoded_parameters
    untied = account(SETTINGS["swiglu, untied, grouped"], VOCAB)
    assert untied.decoded_parameters == untied.parameters["total"] - VOCAB * 32 + 32


def test_experts_that_a_token_is_not_sent_to_are_not_active() -> None:
    swiglu = {"kind": "swiglu"}
    spec = {"kind": "moe", "experts": [swiglu], "num_experts": 8, "top_k": 2, "hidden": 10}
    settings = ModelSettings(d_model=32, n_layers=3, feed_forward=spec)
    dense = ModelSettings(d_model=32, n_layers=3, feed_forward={**swiglu, "hidden": 10})
    experts, one = account(settings, VOCAB), account(dense, VOCAB)
    assert one.active_parameters == one.parameters["total"]
    router, expert = 8 * 32, 3 * 32 * 10
    assert experts.parameters["feed_forward"] == 3 * (8 * expert + router)
    assert experts.parameters["total"] - experts.active_parameters == 3 * 6 * expert
    assert experts.active_parameters - one.active_parameters == 3 * (router + expert)
    # The embedding is read again as the head.
    assert experts.decoded_parameters == experts.active_parameters + 32
    within = {"kind": "conv-kan", "hidden": 10, "block": {**spec}}
    del within["block"]["hidden"]
    convolved = account(dataclasses.replace(settings, feed_forward=within), VOCAB)
    assert convolved.active_parameters - experts.active_parameters == 3 * 32 * (4 + 1)


def test_a_config_and_its_settings_count_the_same(settings: ModelSettings) -> None:
    assert account(KanLMConfig.from_settings(settings, VOCAB)) == account(settings, VOCAB)


def test_the_label_names_the_kind_of_every_layer() -> None:
    assert account(SETTINGS["kan"], VOCAB).feed_forward == "kan/hermite3-squash"
    mixed = account(SETTINGS["a kind a layer"], VOCAB).feed_forward
    assert mixed == "1×gelu + 1×kan/bspline3-g6 + 1×swiglu + 1×relu2"


def test_the_label_of_a_hybrid_says_how_many_layers_follow_each_other() -> None:
    gelu, swiglu = {"kind": "gelu"}, {"kind": "swiglu"}
    for layers, label in (
        ([{**swiglu, "repeat": 3}, {**gelu, "repeat": 2}], "3×swiglu + 2×gelu"),
        ([gelu, swiglu, gelu, gelu, gelu], "1×gelu + 1×swiglu + 3×gelu"),
        ([{**gelu, "repeat": 5}], "gelu"),
    ):
        hybrid = ModelSettings(d_model=32, n_layers=5, feed_forward=layers)
        assert account(hybrid, VOCAB).feed_forward == label


def test_a_vocabulary_is_needed() -> None:
    with pytest.raises(ValueError, match="vocab_size is null"):
        account(SETTINGS["kan"])
