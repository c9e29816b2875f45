"""Which backend a run takes, and that a resumed one takes the same."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from kanlm.config import Config, from_tree, merge, to_tree
from kanlm.errors import Interrupted, UserError
from kanlm.experiments.single import train
from kanlm.kan import cpp_build
from kanlm.kan.kernels import dispatch, measured, use_backend
from kanlm.kan.kernels.measured import Measured
from kanlm.training import kernel_choice
from kanlm.training.callbacks import Callback
from kanlm.training.resolve import resolve

native_only = pytest.mark.skipif(
    cpp_build.obstacle() is not None, reason=f"no native kernels: {cpp_build.obstacle()}"
)


@pytest.fixture
def choosing(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A run that chooses, on a machine that has not been asked before."""
    empty = tmp_path / "cache" / "backends"
    empty.mkdir(mode=0o700, parents=True)
    monkeypatch.setattr(measured, "cache_folder", lambda name: empty)
    training = {"kan_backend": "auto", "steps": 3, "checkpoint_every": 2, "evaluate_every": None}
    model = {"feed_forward": "kan"}
    return resolve(from_tree(merge(to_tree(config), {"training": training, "model": model})))


class Preferred(Callback):
    """Notes what layers prefer at every step."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.seen: list[str] = []
        self.stop_after = stop_after

    def after_step(self) -> None:
        self.seen.append(dispatch._preferred)
        if len(self.seen) == self.stop_after:
            os.kill(os.getpid(), signal.SIGTERM)


def read(folder: str) -> str:
    return json.loads((Path(folder) / "results.json").read_text())["provenance"]["kan_backend"]


@native_only
def test_the_fastest_is_taken_told_and_recorded(choosing, monkeypatch, capsys) -> None:
    slow = {"recompute": 3.0, "torch": 2.0}
    monkeypatch.setattr(measured, "_interleaved", lambda run, able, device: slow)
    noted = Preferred()
    train(choosing, callbacks=[noted])
    assert noted.seen == ["torch"] * 3
    assert dispatch._preferred == "recompute"
    said = [line for line in capsys.readouterr().out.splitlines() if "kan_backend" in line]
    assert len(said) == 1
    assert (
        "torch, the fastest here (C++ 3000" in said[0].replace("12000", "3000") or "C++" in said[0]
    )
    assert read(choosing.output_dir) == "torch"


def test_a_setting_is_taken_without_timing(choosing, monkeypatch) -> None:
    tree = merge(to_tree(choosing), {"training": {"kan_backend": "torch"}})
    monkeypatch.setattr(kernel_choice, "fastest_backend", None)
    noted = Preferred()
    train(resolve(from_tree(tree)), callbacks=[noted])
    assert noted.seen == ["torch"] * 3
    assert read(choosing.output_dir) == "torch"


def test_use_backend_around_a_run_holds(choosing, monkeypatch) -> None:
    monkeypatch.setattr(kernel_choice, "remembered_backend", None)
    with use_backend("recompute"):
        train(choosing)
    assert read(choosing.output_dir) == ""


@native_only
def test_timing_changes_no_number(choosing, tmp_path, monkeypatch) -> None:
    """A run that measured and one that was told have the same bits, dropout included."""
    slow = {"recompute": 1.0, "torch": 2.0}
    monkeypatch.setattr(measured, "_interleaved", lambda run, able, device: slow)
    weights = []
    for backend in ("auto", "recompute"):
        parts = {"output_dir": str(tmp_path / backend), "training": {"kan_backend": backend}}
        train(resolve(from_tree(merge(to_tree(choosing), parts))))
        weights.append((tmp_path / backend / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_a_resumed_run_takes_what_it_took(choosing, monkeypatch) -> None:
    found = Measured("torch", {"recompute": 2.0, "torch": 1.0}, 64, {})
    monkeypatch.setattr(kernel_choice, "remembered_backend", lambda *_, **__: found)
    with pytest.raises(Interrupted):
        train(choosing, callbacks=[Preferred(stop_after=1)])
    assert dispatch._preferred == "recompute"
    monkeypatch.setattr(kernel_choice, "remembered_backend", None)
    noted = Preferred()
    train(choosing, callbacks=[noted])
    assert noted.seen == ["torch"] * 2
    assert read(choosing.output_dir) == "torch"


class PreferredInValidation(Callback):
    """Notes what layers prefer in validations, and may stop the run ahead of the first."""

    def __init__(self, *, stop: bool) -> None:
        self.stop, self.seen = stop, []

    def after_update(self) -> None:
        if self.stop:
            os.kill(os.getpid(), signal.SIGTERM)

    def after_validation(self, figures: object) -> None:
        self.seen.append(dispatch._preferred)


def test_a_validation_left_to_the_resumed_run_takes_it_too(choosing, monkeypatch) -> None:
    parts = {"training": {"kan_backend": "torch", "evaluate_every": 1}}
    config = resolve(from_tree(merge(to_tree(choosing), parts)))
    with pytest.raises(Interrupted):
        train(config, callbacks=[PreferredInValidation(stop=True)])
    noted = PreferredInValidation(stop=False)
    train(config, callbacks=[noted])
    assert noted.seen == ["torch"] * 3


def test_a_resume_that_is_refused_leaves_layers_as_they_were(choosing) -> None:
    parts = {"training": {"kan_backend": "torch"}}
    config = resolve(from_tree(merge(to_tree(choosing), parts)))
    with pytest.raises(Interrupted):
        train(config, callbacks=[Preferred(stop_after=1)])

    class Stateful(Callback):
        def state_dict(self) -> dict[str, int]:
            return {"count": 0}

    with pytest.raises(UserError, match="Stateful"):
        train(config, callbacks=[Stateful()])
    assert dispatch._preferred == "recompute"


def test_kernels_that_fail_leave_the_run_to_others(choosing) -> None:
    tree = merge(to_tree(choosing), {"training": {"kan_backend": "triton"}})
    tree["training"]["precision"] = "fp64"
    with pytest.warns(UserWarning, match="'triton' are not used: takes float32"):
        train(resolve(from_tree(tree)))
    assert read(choosing.output_dir) == "recompute"
    assert torch.get_default_dtype() == torch.float32


@native_only
def test_a_machine_is_asked_once(choosing, tmp_path, monkeypatch) -> None:
    """Times are never twice the same, and a run that is started anew must be the same."""
    taken = []
    for name, degree, fastest in (
        ("first", 3, "torch"),
        ("again", 3, "recompute"),
        ("other", 2, "recompute"),
    ):
        times = {"recompute": 2.0, "torch": 2.0, fastest: 1.0}
        monkeypatch.setattr(measured, "_interleaved", lambda *_, times=times: times)
        block = {"kind": "kan", "basis": {"kind": "hermite", "degree": degree}}
        parts = {"output_dir": str(tmp_path / name), "model": {"feed_forward": block}}
        config = resolve(from_tree(merge(to_tree(choosing), parts)))
        train(config)
        taken.append(read(config.output_dir))
    assert taken == ["torch", "torch", "recompute"]


def test_a_damaged_memory_is_measured_again(choosing, tmp_path, monkeypatch) -> None:
    found = Measured("torch", {"recompute": 2.0, "torch": 1.0}, 64, {})
    monkeypatch.setattr(measured, "fastest_backend", lambda *_, **__: found)
    model = torch.nn.ModuleList()
    model.weight = torch.nn.Parameter(torch.ones(1))
    assert measured.remembered_backend(model, tokens=64) == found
    (path,) = (tmp_path / "cache" / "backends").iterdir()
    for content in ("", "[]", '["nothing", {}, 3]', "{}"):
        path.write_text(content)
        assert measured.remembered_backend(model, tokens=64) == found
    monkeypatch.setattr(measured, "fastest_backend", None)
    path.write_text('["recompute", {"recompute": 1.0}, 64]')
    assert measured.remembered_backend(model, tokens=64).backend == "recompute"
