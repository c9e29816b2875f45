"""The configuration carries ModelSettings into transformers and back."""

import dataclasses
import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from kanlm.model import KanLMConfig
from kanlm.model.settings import ModelSettings

SETTINGS = ModelSettings(
    vocab_size=99,
    d_model=48,
    n_layers=2,
    n_heads=6,
    n_kv_heads=3,
    context_length=10,
    feed_forward=[{"kind": "gelu", "hidden": 3}, {"kind": "kan", "hidden": 4, "base": None}],
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
    assert ours.pop("feed_forward") == {**theirs.pop("feed_forward"), "hidden": 64}
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


def test_solved_widths_are_written_down(tmp_path: Path) -> None:
    KanLMConfig(feed_forward={"kind": "swiglu"}).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["feed_forward"] == {"kind": "swiglu", "hidden": 341}
    assert written["model_type"] == "kanlm"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_heads": 3}, "n_heads = 3 does not divide d_model = 128"),
        ({"feed_forward": {"kind": "kna"}}, "did you mean 'kan'"),
        ({"feed_forward": [{"kind": "kan"}]}, "feed_forward lists 1 kinds"),
    ],
)
def test_impossible_settings_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KanLMConfig(**fields)
