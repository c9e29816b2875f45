import errno
import json

import pytest
import torch
from torch import nn

from kanlm import files
from kanlm.config import OptimizerSettings
from kanlm.errors import UserError
from kanlm.training import checkpoint as checkpoints
from kanlm.training.optimizer import build_optimizer


class Tied(nn.Module):
    def __init__(self, width: int = 3):
        super().__init__()
        self.embedding = nn.Embedding(4, width)
        self.head = nn.Linear(width, 4, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(width))
        self.register_buffer("knots", torch.arange(3.0))


def trained(seed: int = 0) -> tuple[Tied, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Tied()
    optimizer = build_optimizer(model, OptimizerSettings())
    for _ in range(3):
        step(model, optimizer)
    return model, optimizer


def step(model: Tied, optimizer: torch.optim.Optimizer) -> None:
    (model.head(model.embedding.weight * model.scale) ** 2).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def save(folder, number, model, optimizer, keep=2):
    random = {"cpu": torch.get_rng_state()}
    return checkpoints.save_checkpoint(
        folder, number, model, optimizer, [random], {"best": 0.5}, keep
    )


def test_loading_goes_on_bit_for_bit(tmp_path):
    model, optimizer = trained()
    save(tmp_path, 3, model, optimizer)
    other, other_optimizer = trained(seed=1)
    found = checkpoints.latest_checkpoint(tmp_path)
    assert found is not None
    state = checkpoints.load_checkpoint(found, other, other_optimizer)
    assert state == {"step": 3, "best": 0.5}
    for _ in range(2):
        step(model, optimizer)
        step(other, other_optimizer)
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_only_the_newest_are_kept_and_latest_names_the_last(tmp_path):
    model, optimizer = trained()
    for number in (1, 2, 3):
        save(tmp_path, number, model, optimizer)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000002", "step-00000003"]
    found = checkpoints.latest_checkpoint(tmp_path)
    assert found is not None
    assert found.name == "step-00000003"


def test_another_architecture_is_refused_by_name(tmp_path):
    model, optimizer = trained()
    place = save(tmp_path, 1, model, optimizer)
    wider = Tied(width=5)
    with pytest.raises(
        UserError, match=r"another architecture: scale is \(3,\) there and \(5,\) in"
    ):
        checkpoints.load_checkpoint(place, wider, build_optimizer(wider, OptimizerSettings()))


def test_a_truncated_file_is_named(tmp_path):
    model, optimizer = trained()
    place = save(tmp_path, 1, model, optimizer)
    file = place / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"optimizer\.safetensors cannot be read"):
        checkpoints.load_checkpoint(place, model, optimizer)


def test_a_full_disk_leaves_the_previous_checkpoint_and_nothing_else(tmp_path, monkeypatch):
    model, optimizer = trained()
    save(tmp_path, 1, model, optimizer)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(UserError, match="no space is left on the disk"):
        save(tmp_path, 2, model, optimizer)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001"]
    assert (tmp_path / "latest").read_text() == "step-00000001"


def test_a_killed_write_is_not_taken_for_a_checkpoint(tmp_path, monkeypatch):
    model, optimizer = trained()
    save(tmp_path, 1, model, optimizer)

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "_flush", killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2, model, optimizer)
    found = checkpoints.latest_checkpoint(tmp_path)
    assert found is not None
    assert json.loads((found / "state.json").read_text())["step"] == 1


def test_latest_cannot_lead_out_of_the_folder(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "state.json").write_text("{}")
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "latest").write_text("../outside")
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoints.latest_checkpoint(folder)
