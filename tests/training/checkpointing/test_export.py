"""A finished run's model/ is what was written there, or a line says what is not."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kanlm.config import from_tree, load
from kanlm.errors import UserError
from kanlm.model.grids import with_grid_size
from kanlm.training.checkpointing.export import load_tokenizer, load_trained, model_folder
from kanlm.training.resolve import resolve
from kanlm.training.run import run


@pytest.fixture
def kan(tmp_path: Path, finished_runs: Path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(finished_runs / "kan", tmp_path / "kan"))


def refused(folder: Path) -> str:
    """The line for which both the model and the tokenizer, or the model alone, are refused."""
    with pytest.raises(UserError) as caught:
        load_trained(folder)
    line = str(caught.value)
    assert line.startswith(str(folder))
    assert "\n" not in line
    return line


def unseal(folder: Path) -> Path:
    (folder / "model" / "index.json").unlink()
    return folder / "model"


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_model_is_loaded_as_transformers_loads_it(kan: Path):
    """Which the seal does not disturb."""
    model = load_trained(kan)
    theirs = AutoModelForCausalLM.from_pretrained(kan / "model")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, theirs.eval()(ids).logits)
    tokenizer, other = load_tokenizer(kan), AutoTokenizer.from_pretrained(kan / "model")
    assert tokenizer.encode("a cat") == other.encode("a cat")
    assert model.config.settings == theirs.config.settings
    # What stands before a text in training, and after it.
    ends = {"bos_token_id": other.bos_token_id, "eos_token_id": other.eos_token_id}
    for config in (model.config, theirs.config, theirs.generation_config):
        assert {name: getattr(config, name) for name in ends} == ends
    assert load_trained(kan, dropout=0.25).config.dropout == 0.25


def test_every_file_is_under_the_seal(kan: Path):
    place = kan / "model"
    names = {path.name for path in place.iterdir()}
    assert names == {*json.loads((place / "index.json").read_text())["files"], "index.json"}
    for name in sorted(names):
        good = (place / name).read_bytes()
        half = len(good) // 2
        for bad in (good[:half], good[:half] + bytes([good[half] ^ 1]) + good[half + 1 :]):
            (place / name).write_bytes(bad)
            assert f"{place} is damaged: " in refused(kan)
            with pytest.raises(UserError, match="is damaged: "):
                load_tokenizer(kan)
        (place / name).write_bytes(good)
    (place / "more.bin").touch()
    assert "more.bin is not in index.json" in refused(kan)


def test_a_model_card_and_what_git_needs_may_lie_beside(kan: Path):
    (kan / "model" / "README.md").write_text("# A model")
    (kan / "model" / ".cache").mkdir()
    assert model_folder(kan) == kan / "model"


def test_a_model_without_a_seal_is_taken_as_it_is(kan: Path):
    before = load_trained(kan).state_dict()
    unseal(kan)
    for name, value in load_trained(kan).state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model_type": "gpt2"}, "is of another architecture: model_type is 'gpt2'"),
        # Of these the weights' shapes say nothing.
        ({"n_heads": 4}, "config.json is of another architecture: n_heads = 4, and 2 in "),
        ({"rope_theta": 500.0}, "rope_theta = 500.0, and 10000.0 in "),
        ({"norm_epsilon": 0.5}, "norm_epsilon = 0.5, and 1e-06 in "),
        ({"vocab_size": 10**9}, "vocab_size = 1000000000, and 257 in "),
        ({"vocab_size": 10**12}, "vocab_size = 1000000000000: expected at least 2, at most 2,147"),
        ({"n_layers": 10**5}, "n_layers = 100000, and 2 in "),
        ({"n_layers": 10**9}, "n_layers = 1000000000: expected at most 100,000"),
        ({"d_model": "wide"}, 'config.json.d_model = "wide": '),
        ({"d_model": 10**400}, "expected at most 2,147,483,647"),
        ({"norm_epsilon": float("nan")}, "config.json cannot be read: NaN is no number"),
        ({"feed_forward": "swiglu"}, "config.json.feed_forward = "),
        ({"feed_forward": {"kind": "os.system"}}, "'os.system' is unknown"),
        ({"feed_forward": {"kind": "kan", "degree": 10**9}}, "unknown setting"),
        ({"auto_map": {"AutoConfig": "evil.Config"}}, "auto_map asks for code of its own"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_model_that_is_not_its_runs_is_refused(values: dict, said: str, kan: Path):
    """Before anything of the size that is claimed is built."""
    change(unseal(kan) / "config.json", **values)
    assert said in refused(kan)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff{", b'{"a":' * 100_000])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
def test_a_file_that_is_no_json_is_refused(name: str, content: bytes, kan: Path):
    path = unseal(kan) / name
    path.write_bytes(content)
    assert str(path.parent) in refused(kan)


def test_what_transformers_would_do_by_a_config_is_not_done(kan: Path):
    """Attention kernels come from the hub by name, and precision would be another."""
    change(unseal(kan) / "config.json", _attn_implementation="evil/kernel", dtype="float16")
    assert load_trained(kan).dtype == torch.float32


EVIL = """
import pathlib
pathlib.Path({canary!r}).touch()
from transformers import PreTrainedTokenizerFast as Evil
"""


def test_code_beside_a_tokenizer_is_not_run(kan: Path, tmp_path: Path):
    canary = tmp_path / "canary"
    place = unseal(kan)
    (place / "evil.py").write_text(EVIL.format(canary=str(canary)))
    change(place / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.Evil"]})
    with pytest.raises(UserError, match=r"tokenizer_config\.json: auto_map asks for code"):
        load_tokenizer(kan)
    refused(kan)
    assert not canary.exists()
    assert "evil" not in sys.modules


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_link_out_of_the_folder_or_a_pipe_is_refused(name: str, kan: Path, tmp_path: Path):
    path = kan / "model" / name
    shutil.move(path, tmp_path / name)
    path.symlink_to(tmp_path / name)
    assert f"{name} is a link that leads out of its folder" in refused(kan)
    path.unlink()
    os.mkfifo(path)
    assert f"{name} is no ordinary file" in refused(kan)


def damaged_weights(act: Callable[[dict[str, torch.Tensor]], object], place: Path) -> None:
    tensors = load_file(place / "model.safetensors")
    act(tensors)
    save_file(tensors, place / "model.safetensors")


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda t: t.popitem(), "is of another architecture: "),
        (lambda t: t.update(more=torch.zeros(3)), "is of another architecture: more is (3,)"),
        (lambda t: next(iter(t.values())).view(-1)[3:4].fill_(torch.nan), "is damaged: model."),
        (lambda t: next(iter(t.values())).view(-1)[3:4].fill_(torch.inf), "no finite number"),
    ],
)
def test_weights_that_do_not_fit_or_are_no_numbers_are_refused(act, said: str, kan: Path):
    damaged_weights(act, unseal(kan))
    assert said in refused(kan)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x02\0\0\0\0\0\0\0{}", b"\0" * 8])
def test_weights_that_are_none_are_refused(content: bytes, kan: Path):
    (unseal(kan) / "model.safetensors").write_bytes(content)
    assert "model.safetensors" in refused(kan)


def test_a_tokenizer_of_other_size_is_refused(kan: Path):
    place = unseal(kan)
    state = json.loads((place / "tokenizer.json").read_text())
    state["added_tokens"].append({**state["added_tokens"][0], "id": 257, "content": "<more>"})
    (place / "tokenizer.json").write_text(json.dumps(state))
    assert "vocab_size = 257, and 258 in " in refused(kan)


def test_a_tokenizer_that_ends_no_document_is_refused(kan: Path):
    change(unseal(kan) / "tokenizer_config.json", eos_token=None)
    assert "has no eos token to end documents with" in refused(kan)


def test_grids_that_were_never_refined_are_the_models(tmp_path: Path, make_tree):
    """As where training stopped early; a run's settings state the last grid."""
    tree = make_tree(
        tmp_path,
        model={"feed_forward": {"kind": "kan-local", "basis": {"kind": "bspline", "degree": 2}}},
        training={
            "grid_schedule": {0: 2, 9: 4},
            "evaluate_every": 1,
            "early_stopping_patience": 1,
        },
        # Nothing gets any better.
        optimizer={"learning_rate": 1e-30},
    )
    config = resolve(from_tree(tree))
    assert run(config) is not None
    folder = Path(config.output_dir)
    model = load_trained(folder)
    assert model.config.settings.feed_forward == with_grid_size(config.model, 2).feed_forward
    assert load(folder / "config.yaml").model.feed_forward == config.model.feed_forward
    place = unseal(folder)
    too_fine = with_grid_size(config.model, 8).feed_forward
    change(place / "config.json", feed_forward=too_fine)
    assert "config.json: grid_size = 8, and at most 4 in " in refused(folder)
