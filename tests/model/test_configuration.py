"""The configuration carries ModelSettings into transformers and back."""

import dataclasses
import inspect
import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from kanlm.kan import BASES
from kanlm.model import KanLMConfig
from kanlm.model.feed_forward import FEED_FORWARDS
from kanlm.model.settings import ModelSettings

SETTINGS = ModelSettings(
    vocab_size=99,
    d_model=48,
    n_layers=2,
    n_heads=6,
    n_kv_heads=3,
    context_length=10,
    feed_forward=[
        {"kind": "gelu", "hidden": 3},
        {
            "kind": "kan",
            "hidden": 4,
            "base": None,
            "start": "random",
            "basis": {
                "kind": "hermite",
                "degree": 3,
                "constant": True,
                "half_width": 3.5,
                "outside": "squash",
            },
        },
    ],
    dropout=0.1,
    qk_norm=True,
    tie_embeddings=False,
    rope_theta=500.0,
    norm_epsilon=1e-5,
)


def test_settings_survive(tmp_path: Path) -> None:
    config = KanLMConfig.from_settings(SETTINGS, 99, bos_token_id=1, eos_token_id=2)
    assert config.settings == SETTINGS
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, KanLMConfig)
    assert loaded.settings == SETTINGS
    assert (loaded.bos_token_id, loaded.eos_token_id) == (1, 2)


def test_defaults_are_those_of_the_settings() -> None:
    config = KanLMConfig()
    ours = dataclasses.asdict(config.settings)
    theirs = dataclasses.asdict(ModelSettings())
    assert ours.pop("feed_forward")["kind"] == theirs.pop("feed_forward")["kind"]
    assert ours == theirs


def test_transformers_names_lead_to_ours() -> None:
    config = KanLMConfig.from_settings(SETTINGS, 99)
    assert config.hidden_size == 48
    assert config.num_hidden_layers == 2
    assert config.num_attention_heads == 6
    assert config.num_key_value_heads == 3
    assert config.max_position_embeddings == 10
    assert config.tie_word_embeddings is False
    assert KanLMConfig(n_heads=8).num_key_value_heads == 8


@pytest.mark.parametrize("kind", FEED_FORWARDS)
def test_every_option_is_written_down(kind: str, tmp_path: Path) -> None:
    """The kind's and the basis's, and the solved width: a default may change later."""
    KanLMConfig(feed_forward={"kind": kind}).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "kanlm"
    options = written["feed_forward"]
    width = {"hidden"} if FEED_FORWARDS[kind].has_width else set()
    assert set(options) == {"kind", *width, *keyword_only(FEED_FORWARDS[kind])}
    assert not width or options["hidden"] > 1
    if "basis" in options:
        assert set(options["basis"]) == {"kind", *keyword_only(BASES[options["basis"]["kind"]])}


def keyword_only(factory: type) -> list[str]:
    parameters = inspect.signature(factory).parameters.values()
    return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_heads": 3}, "n_heads = 3 does not divide d_model = 128"),
        (
            {"feed_forward": {"kind": "kann"}},
            "feed_forward.kind = 'kann' is unknown; expected one of: .*kan",
        ),
        ({"feed_forward": [{"kind": "kan"}]}, "feed_forward lists 1 layers, and n_layers = 4"),
    ],
)
def test_impossible_settings_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KanLMConfig(**fields)
