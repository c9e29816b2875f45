import errno
import json

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn

from kanlm import atomic_io
from kanlm.checksums import write_checksums
from kanlm.config import OptimizerSettings
from kanlm.errors import UserError
from kanlm.training.checkpointing import reader, tensors
from kanlm.training.checkpointing.writer import Tensors, Writer
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


def held(model, optimizer) -> Tensors:
    return {"model": tensors.weights(model), "optimizer": tensors.moments(model, optimizer)}


def save(folder, number, model, optimizer, keep=2, best_step=None):
    writer = Writer(Accelerator(cpu=True), folder, background=False)
    writer.start(number, held(model, optimizer), {"best": 0.5}, keep=keep, best_step=best_step)
    return reader.checkpoint_folder(folder, number)


def find(folder, said=None):
    """The checkpoint to resume; lines that were reported go to `said`."""
    lines = []
    found = reader.checkpoint_to_resume(folder, lines.append)
    assert lines == (said or [])
    return found


def test_loading_goes_on_bit_for_bit(tmp_path):
    model, optimizer = trained()
    save(tmp_path, 3, model, optimizer)
    other, other_optimizer = trained(seed=1)
    found = find(tmp_path)
    assert found is not None
    state = reader.load_checkpoint(found, other, other_optimizer)
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
    found = find(tmp_path)
    assert found is not None
    assert found.name == "step-00000003"


def test_another_architecture_is_refused_by_name(tmp_path):
    model, optimizer = trained()
    place = save(tmp_path, 1, model, optimizer)
    wider = Tied(width=5)
    with pytest.raises(
        UserError, match=r"another architecture: scale is \(3,\) there and \(5,\) in"
    ):
        reader.load_checkpoint(place, wider, build_optimizer(wider, OptimizerSettings()))


FILES = ["model.safetensors", "optimizer.safetensors", "random-0.safetensors", "state.json"]


def damage(path, kind):
    content = bytearray(path.read_bytes())
    if kind == "gone":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("file", [*FILES, "index.json"])
@pytest.mark.parametrize("kind", ["truncated", "flipped", "gone"])
def test_a_damaged_file_makes_the_previous_checkpoint_take_over(tmp_path, file, kind):
    model, optimizer = trained()
    previous = save(tmp_path, 1, model, optimizer)
    newest = save(tmp_path, 2, model, optimizer)
    damage(newest / file, kind)
    said = []
    assert reader.checkpoint_to_resume(tmp_path, said.append) == previous
    (line,) = said
    # A wrong checksum may be the file's or the index's fault.
    named = "" if file == "index.json" else f"{file} "
    assert line.startswith(f"{newest} is damaged: {named}")
    assert line.endswith("; resuming from step-00000001")
    assert "\n" not in line


def test_without_an_intact_checkpoint_nothing_is_begun_anew_by_itself(tmp_path):
    model, optimizer = trained()
    for number in (1, 2):
        damage(save(tmp_path, number, model, optimizer) / "state.json", "truncated")
    with pytest.raises(UserError, match=r"step-00000002 is damaged: .* no other is intact of 2"):
        find(tmp_path)


def test_a_lost_pointer_costs_nothing(tmp_path):
    model, optimizer = trained()
    newest = save(tmp_path, 7, model, optimizer)
    (tmp_path / "latest").unlink()
    assert find(tmp_path) == newest


def test_a_pointer_put_back_by_hand_is_followed(tmp_path):
    model, optimizer = trained()
    places = [save(tmp_path, number, model, optimizer) for number in (1, 2)]
    (tmp_path / "latest").write_text(places[0].name)
    assert find(tmp_path) == places[0]


def test_the_best_is_kept_until_there_is_a_better(tmp_path):
    model, optimizer = trained()
    for number, best in [(1, 1), (2, 1), (3, 1), (4, 1), (5, 5), (6, 5), (7, 5)]:
        save(tmp_path, number, model, optimizer, best_step=best)
        kept = [int(p.name.removeprefix("step-")) for p in sorted(tmp_path.glob("step-*"))]
        assert kept == sorted({best, max(1, number - 1), number})


def test_a_newer_damaged_checkpoint_does_not_push_out_an_intact_one(tmp_path):
    model, optimizer = trained()
    for number in (4, 8, 12):
        place = save(tmp_path, number, model, optimizer)
    damage(place / "model.safetensors", "truncated")
    save(tmp_path, 10, model, optimizer)
    assert {p.name for p in tmp_path.glob("step-*")} >= {"step-00000008", "step-00000010"}


def test_what_a_kill_left_behind_is_swept_away(tmp_path):
    model, optimizer = trained()
    for name in (".step-00000001.draft", ".step-00000001.deleted"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    save(tmp_path, 2, model, optimizer)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000002"]


@pytest.mark.parametrize(
    ("file", "tensors", "said"),
    [
        ("optimizer.safetensors", {"scale:exp_avg": torch.ones(7)}, "another architecture: scale"),
        ("optimizer.safetensors", {"x:exp_avg": torch.ones(3)}, "x:exp_avg is of no parameter"),
        (
            "optimizer.safetensors",
            {"scale:step": torch.tensor(3.0), "scale:exp_avg": torch.tensor(0.0)},
            "another architecture: scale:exp_avg",
        ),
        (
            "optimizer.safetensors",
            {"scale:step": torch.tensor(3.0), "scale:exp_avg": torch.ones(3)},
            "scale:exp_avg_sq",
        ),
        ("random-0.safetensors", {"cpu": torch.ones(3)}, "holds no random state"),
        ("random-0.safetensors", {"gpu": torch.ones(3)}, "holds no random state"),
    ],
)
def test_a_sealed_checkpoint_of_something_else_is_refused(tmp_path, file, tensors, said):
    model, optimizer = trained()
    place = save(tmp_path, 1, model, optimizer)
    save_file(tensors, place / file)
    write_checksums(place)

    def load():
        reader.load_checkpoint(place, model, optimizer)
        reader.load_random_state(place, 0)

    with pytest.raises(UserError, match=said):
        load()


def test_a_full_disk_leaves_the_previous_checkpoint_and_nothing_else(tmp_path, monkeypatch):
    model, optimizer = trained()
    save(tmp_path, 1, model, optimizer)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensors, "save_file", full)
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
        patch.setattr(atomic_io, "flush", killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2, model, optimizer)
    found = find(tmp_path)
    assert found is not None
    assert json.loads((found / "state.json").read_text())["step"] == 1


@pytest.mark.parametrize("name", ["../outside", "..", ".", "", "/tmp", "step-1", "\0", "\xff"])
def test_latest_cannot_lead_out_of_the_folder(tmp_path, name):
    model, optimizer = trained()
    save(tmp_path / "outside", 1, model, optimizer)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "latest").write_text(name)
    with pytest.raises(UserError, match="no checkpoint"):
        find(folder)


def test_a_link_is_neither_followed_nor_deleted_through(tmp_path):
    """Somebody else's run folder must not make us write or delete in a third place."""
    model, optimizer = trained()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis").write_text("I")
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "step-00000001").symlink_to(tmp_path / "precious")
    (folder / ".step-00000002.draft").symlink_to(tmp_path / "precious")
    (folder / ".latest.draft").symlink_to(tmp_path / "precious" / "thesis")
    with pytest.raises(UserError, match="link"):
        save(folder, 2, model, optimizer, keep=1)
    assert [p.name for p in (tmp_path / "precious").iterdir()] == ["thesis"]
    assert (tmp_path / "precious" / "thesis").read_text() == "I"


def test_a_checkpoint_that_cannot_be_begun_leaves_nothing(tmp_path, monkeypatch):
    """Copies for the background may not fit into memory."""
    model, optimizer = trained()
    writer = Writer(Accelerator(cpu=True), tmp_path, background=True)

    def too_much(part):
        raise MemoryError

    monkeypatch.setattr(tensors.OwnPart, "copied", too_much)
    with pytest.raises(MemoryError):
        writer.start(1, held(model, optimizer), {}, keep=2)
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


def test_weights_of_another_type_are_refused(tmp_path):
    """Numbers cut to integers would go unnoticed."""
    model, optimizer = trained()
    place = save(tmp_path, 1, model, optimizer)
    cut = {name: tensor.to(torch.int8) for name, tensor in tensors.weights(model).items()}
    save_file(cut, place / "model.safetensors")
    write_checksums(place)
    with pytest.raises(UserError, match="int8"):
        reader.load_checkpoint(place, model, optimizer)
