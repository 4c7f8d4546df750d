"""Checkpoints: whole or not at all, fitting or refused, and no file runs code."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tools.checkpoints import read_tensors
from tools.command import UserError
from tools.training import load_checkpoint, save_checkpoint


def net(classes=2):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, classes, 1))


def test_checkpoints_that_do_not_fit(tmp_path):
    file = tmp_path / "model.pt"
    save_checkpoint(file, net(), epoch=3)
    other = net()
    assert load_checkpoint(file, other)["epoch"] == 3
    state = torch.load(file, weights_only=True)["model"]
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
    for model in (nn.Linear(2, 2), net(5)):
        with pytest.raises(UserError, match=r"model\.pt .*another backbone or number of classes"):
            load_checkpoint(file, model)
    with pytest.raises(UserError, match=r"none\.pt is missing: .*--overwrite"):
        load_checkpoint(tmp_path / "none.pt", net())
    content = file.read_bytes()
    for damage in (b"", content[:1000], content[:-400], b"PK\3\4", b"\x80\x02"):
        file.write_bytes(damage)
        with pytest.raises(UserError, match=r"model\.pt cannot be read .*--overwrite"):
            load_checkpoint(file, net())
    for wrong in ([1, 2], {"weights": {}}, {"model": 3}, {"model": [1]}, {"model": {"a": 1}}):
        torch.save(wrong, file)
        with pytest.raises(UserError, match=r"model\.pt (is no checkpoint|was made for another)"):
            load_checkpoint(file, net())


class Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


def test_a_checkpoint_runs_no_code(tmp_path):
    torch.save({"model": net().state_dict(), "epoch": Hostile(tmp_path / "ran")}, tmp_path / "model.pt")
    for name, word in (("model", "cannot be read"), ("none", "is missing")):
        with pytest.raises(UserError, match=rf"{name}\.pt {word}.*: get it again"):
            read_tensors(tmp_path / f"{name}.pt", "get it again")
    assert not (tmp_path / "ran").exists()


def test_a_failed_save_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    file = tmp_path / "checkpoint.pt"
    save_checkpoint(file, net(), epoch=1)
    before = file.read_bytes()

    def full(content, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(file, net(), epoch=2)
    assert file.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_every_tensor_owns_its_memory(tmp_path):
    """A fused optimiser writes through the view of a file, and crashes where several elements share their memory."""
    shared = torch.arange(6.0).expand(3, 6)
    format = torch.channels_last
    content = {"a": shared, "b": [shared, (shared[:, 1:3], 3)], "c": torch.rand(2, 3, 4, 5).to(memory_format=format)}
    torch.save(content, tmp_path / "a.pt")
    loaded = read_tensors(tmp_path / "a.pt", "")
    assert loaded["b"][1][1] == 3
    tensors = [loaded["a"], loaded["b"][0], loaded["b"][1][0], loaded["c"]]
    for tensor, expected in zip(tensors, (shared, shared, shared[:, 1:3], content["c"]), strict=True):
        assert torch.equal(tensor, expected)
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert len({tensor.data_ptr() for tensor in tensors}) == 4
    assert loaded["c"].is_contiguous(memory_format=format)  # as the parameter that an optimiser pairs it with
    torch.save(torch.zeros(1).expand(1 << 20, 1 << 20), tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt cannot be read .* declares .*: get it again"):
        read_tensors(tmp_path / "a.pt", "get it again")
