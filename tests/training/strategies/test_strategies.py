"""Every strategy: a single run, resumed bit for bit, and what is refused."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kanlm.config import Config, from_tree, to_tree, to_yaml
from kanlm.errors import Interrupted, UserError
from kanlm.training import run as runs
from kanlm.training.checkpointing.export import load_tokenizer
from kanlm.training.resolve import resolve
from kanlm.training.strategies import (
    STRATEGIES,
    OldText,
    Strategy,
    make_strategy,
    open_earlier,
)

#: Options that make the strategy change what happens in so few steps.
OPTIONS: dict[str, dict[str, Any]] = {
    "replay": {"fraction": 0.3},
    "l2sp": {"weight": 10.0},
    "ewc": {"weight": 1e4, "sequences": 3},
    "occupancy-mask": {"threshold": 0.05, "sequences": 4},
    "occupancy-scaling": {"sequences": 4},
    "tf-idf": {"sequences": 4},
    "occupancy-penalty": {"weight": 1e3, "sequences": 4},
    "banded": {"weight": 1e3, "sequences": 4},
    "input-covariance": {"weight": 1e3, "sequences": 4},
}
#: As of `bases`.
NEW_WORDS = ["def", "return", "x", "y", "import", "print", "lambda", "none", "while", "yield"]
#: Those whose numbers are plain's or the base's.
UNCHANGED = ("plain", "frozen")


def weights(folder: str | Path) -> dict[str, Tensor]:
    return load_file(Path(folder) / "model" / "model.safetensors")


def metrics(config: Config) -> list[dict[str, Any]]:
    text = (Path(config.output_dir) / "metrics.jsonl").read_text()
    return [
        {k: v for k, v in line.items() if "second" not in k}
        for line in map(json.loads, text.splitlines())
    ]


def spec(kind: str) -> dict[str, Any]:
    return {"kind": kind, **OPTIONS.get(kind, {})}


@pytest.fixture(scope="module")
def plain_runs(make_tuned, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folder by base of a run without a strategy."""
    folder, found = tmp_path_factory.mktemp("plain"), {}
    for base in ("kan-local", "gelu"):
        config = make_tuned(folder / base, "plain", base)
        runs.run(config)
        found[base] = config.output_dir
    return found


@pytest.mark.parametrize("kind", STRATEGIES)
def test_a_run_is_stopped_and_resumed_bit_for_bit(
    tuned, bases: Path, plain_runs: dict[str, str], at, kind: str
):
    base = "gelu" if kind == "input-covariance" else "kan-local"
    whole, parts = (tuned(spec(kind), name, base) for name in ("whole", "parts"))
    runs.run(whole)
    interrupt = at(2, lambda _: os.kill(os.getpid(), signal.SIGTERM), "after_update")
    with pytest.raises(Interrupted):
        runs.run(parts, callbacks=[interrupt])
    runs.run(parts)
    ours, theirs = weights(whole.output_dir), weights(parts.output_dir)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert metrics(whole) == metrics(parts)
    start = weights(bases / base)
    if kind == "frozen":
        assert all(torch.equal(tensor, start[name]) for name, tensor in ours.items())
    else:
        assert any(not torch.equal(tensor, start[name]) for name, tensor in ours.items())
    if kind not in UNCHANGED:
        plain = weights(plain_runs[base])
        assert any(not torch.equal(tensor, ours[name]) for name, tensor in plain.items())


@pytest.mark.parametrize(
    ("kind", "part"), [("feed-forward-only", ".feed_forward."), ("attention-only", ".attention.")]
)
def test_only_the_named_part_moves(tuned, bases: Path, kind: str, part: str):
    config = tuned(kind, optimizer={"weight_decay": 0.5, "coefficients_weight_decay": 0.5})
    runs.run(config)
    start = weights(bases / "kan-local")
    for name, tensor in weights(config.output_dir).items():
        # Knots are no parameters, and norms start undecayed.
        if part not in name or "knots" in name:
            assert torch.equal(tensor, start[name]), name
        else:
            assert not torch.equal(tensor, start[name]), name


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        ({"fraction": 0.2}, r"'strategy\.kind' is missing; expected one of: plain, replay"),
        ("repaly", "strategy.kind = 'repaly' is unknown; did you mean 'replay'?"),
        ({"kind": "ewc", "wieght": 1.0}, "unknown setting 'strategy.wieght'.*'weight'"),
        ({"kind": "l2sp", "weight": -1.0}, r"strategy\.weight = -1\.0: .*greater than or equal"),
        ({"kind": "l2sp", "weight": float("inf")}, r"strategy\.weight.*finite"),
        ({"kind": "replay", "fraction": 1.0}, r"strategy\.fraction = 1\.0: .*less than 1"),
        ({"kind": "replay", "fraction": 0.0}, r"strategy\.fraction = 0\.0: .*greater than 0"),
        ({"kind": "plain", "weight": 1.0}, "unknown setting 'strategy.weight'"),
        ({"kind": "tf-idf", "share": 1.5}, r"strategy\.share = 1\.5: .*less than 1"),
        ({"kind": "banded", "control": "none at all"}, r"strategy\.control = .*'permuted'"),
        ({"kind": "interpolation", "share": -0.1}, r"strategy\.share = -0\.1"),
        ("input-covariance", "strategy.kind = input-covariance: .* a linear map"),
    ],
)
def test_mistakes_are_named_in_a_line(tuned, strategy: Any, said: str):
    with pytest.raises(UserError, match=said) as caught:
        tuned(strategy)
    assert "\n" not in str(caught.value)


def test_a_strategy_belongs_to_fine_tuning_and_minds_grids_and_the_polish(
    tuned, make_tree, tmp_path
):
    with pytest.raises(UserError, match=r"strategy\.kind = replay .*initialize_from"):
        resolve(from_tree(make_tree(tmp_path, strategy="replay")))
    with pytest.raises(UserError, match=r"strategy\.kind = ewc: .*grid_adaptation_steps"):
        tuned("ewc", training={"grid_adaptation_steps": [2]})
    with pytest.raises(UserError, match=r"interpolation: .*early_stopping_patience"):
        tuned("interpolation", training={"early_stopping_patience": 2})
    for kind in ("occupancy-mask", "banded"):
        with pytest.raises(UserError, match=rf"strategy\.kind = {kind}: .* a KAN layer"):
            tuned(kind, base="gelu")
    with pytest.raises(UserError, match=r"strategy\.kind = frozen: .*polish_steps = 2"):
        tuned("frozen", training={"polish_steps": 2})


def test_what_is_stated_is_in_the_runs_settings_and_may_not_change(tuned):
    config = tuned("replay")
    runs.run(config)
    assert config.strategy == {"kind": "replay", "fraction": 0.1}
    assert "strategy:\n  kind: replay" in to_yaml(config)
    from kanlm.training.run_folder import claim

    with pytest.raises(UserError, match=r"strategy\.fraction = 0\.1, not 0\.2"):
        claim(Path(config.output_dir), tuned({"kind": "replay", "fraction": 0.2}))


def test_what_the_base_lacks_is_refused_in_a_line_and_nothing_is_written(
    tuned, bases: Path, tmp_path: Path
):
    copy = tmp_path / "base"
    shutil.copytree(bases / "kan-local", copy)
    tree = to_tree(tuned("replay", initialize_from=str(copy)))
    config = (copy / "config.yaml").read_text()
    gone = config.replace(str(bases / "words.txt"), str(tmp_path / "gone.txt"))
    (copy / "config.yaml").write_text(gone)
    for kind in ("replay", "ewc", "joint", "continue-on-base"):
        wanted = resolve(from_tree({**tree, "strategy": kind}))
        with pytest.raises(UserError, match=f"strategy.kind = {kind} needs the text of") as caught:
            runs.run(wanted)
        assert "\n" not in str(caught.value)
        assert not (Path(wanted.output_dir) / "config.yaml").exists()
    # Another text is not the one that the base was trained on.
    (tmp_path / "gone.txt").write_text((bases / "new.txt").read_text())
    with pytest.raises(UserError, match="has changed since"):
        runs.run(resolve(from_tree(tree)))
    shutil.rmtree(copy / "model")
    with pytest.raises(UserError, match=r"has no model/ yet"):
        runs.run(resolve(from_tree({**tree, "strategy": "distillation"})))


def test_a_base_that_changed_is_refused_by_a_resumed_run(tuned, bases: Path, tmp_path: Path, at):
    copy = tmp_path / "base"
    shutil.copytree(bases / "kan-local", copy)
    config = tuned("l2sp", initialize_from=str(copy))
    interrupt = at(2, lambda _: os.kill(os.getpid(), signal.SIGTERM), "after_update")
    with pytest.raises(Interrupted):
        runs.run(config, callbacks=[interrupt])
    other = tuned("plain", "other")
    runs.run(other)
    shutil.rmtree(copy / "model")
    shutil.copytree(Path(other.output_dir) / "model", copy / "model")
    with pytest.raises(UserError, match="is not the one that this run was started from"):
        runs.run(config)


def test_old_text_is_that_of_all_runs_before_the_first_ones_first(
    tuned, bases: Path, plain_runs: dict[str, str], make_text
):
    config = tuned("replay", initialize_from=plain_runs["kan-local"])
    tokenizer = load_tokenizer(bases / "kan-local")
    earlier = open_earlier(config, tokenizer, print)
    assert [str(each.folder) for each in earlier] == [
        str(bases / "kan-local"),
        plain_runs["kan-local"],
    ]
    text = OldText(config, earlier)
    written = [make_text(), make_text(NEW_WORDS)]
    for number in range(6):
        ids = text.row(number)["input_ids"][0].tolist()
        # From within one document; an end of a document is none of the text's bytes.
        found = max(str(tokenizer.decode(ids)).split(str(tokenizer.eos_token)), key=len)
        assert found in written[number % 2]
        assert found not in written[1 - number % 2]


class Signs(Strategy):
    """Takes steps of one size.

    Args:
        size: of the gradient's elements.
    """

    def __init__(self, *, size: float = 1.0) -> None:
        self.size = size

    def gradients(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad = self.size * parameter.grad.sign()


def test_a_stranger_adds_one_in_a_class_and_a_line(tuned, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(STRATEGIES, "signs", Signs)
    config = tuned({"kind": "signs", "size": 0.5})
    assert isinstance(make_strategy(config.strategy), Signs)
    runs.run(config)
    line = next(each for each in metrics(config) if each["kind"] == "train")
    count = sum(t.numel() for n, t in weights(config.output_dir).items() if "knots" not in n)
    assert line["gradient_norm"] <= 0.5 * count**0.5 * (1 + 1e-6)
    with pytest.raises(UserError, match=r"strategy\.size = \"big\""):
        tuned({"kind": "signs", "size": "big"})
