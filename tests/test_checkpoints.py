"""Checkpoints of the trainings and of SAM: whole or not at all, fitting or refused, and no file runs code."""

from pathlib import Path

import pytest
import torch
from torch import nn

from PRC_SAM import checkpoints
from PRC_SAM.checkpoints import build_sam, load_sam
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
    with pytest.raises(UserError, match=r"model\.pt was made for another backbone or number of classes"):
        load_checkpoint(file, nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"another backbone or number of classes .*size mismatch"):
        load_checkpoint(file, net(5))
    with pytest.raises(UserError, match="is missing: run the training again"):
        load_checkpoint(tmp_path / "none.pt", net())
    content = file.read_bytes()
    for damage in (b"", content[:1000], content[:-400], b"PK\3\4", b"\x80\x02", b"text"):
        file.write_bytes(damage)
        with pytest.raises(UserError, match=r"model\.pt cannot be read as a checkpoint .*--overwrite"):
            load_checkpoint(file, net())
    for wrong in (
        [1, 2],
        {"weights": {}},
        {"model": 3},
        {"model": [1]},
        {"model": {"a": 1}},
        {"model": {1: torch.zeros(1)}},
    ):
        torch.save(wrong, file)
        with pytest.raises(UserError, match=r"model\.pt (cannot be read|was made for another)"):
            load_checkpoint(file, net())


class Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


def test_a_checkpoint_runs_no_code(tmp_path):
    torch.save({"model": net().state_dict(), "epoch": Hostile(tmp_path / "ran")}, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"model\.pt cannot be read as a checkpoint"):
        load_checkpoint(tmp_path / "model.pt", net())
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


SIZES = {
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "global_attention": [1],
    "image_size": 64,
    "window_size": 3,
    "prompt_dim": 16,
    "decoder_mlp_dim": 8,
}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"embed_dim": 0}, "embed_dim is 0: Input should be greater than or equal to 1"),
        ({"embed_dim": 33}, "embed_dim is 33, which num_heads, 2, does not divide"),
        ({"embed_dim": 1e9}, "embed_dim is 1000000000.0: Input should be less"),
        ({"depth": 10**6}, "depth is 1000000: Input should be less"),
        ({"depth": -1}, "depth is -1"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"num_heads": None}, "num_heads is None"),
        ({"global_attention": [2]}, r"global_attention is \[2\], but the blocks are numbered 0 to 1"),
        ({"global_attention": 1}, "global_attention is 1"),
        ({"image_size": 65}, "image_size is 65: Input should be a multiple of 16"),
        ({"prompt_dim": 8}, "prompt_dim is 8"),
        ({"window_size": 0}, "window_size is 0"),
        ({"layers": 2}, "layers is 2: Unexpected keyword"),
    ],
)
def test_sizes_that_make_no_sam(tmp_path, change, sentence):
    torch.save({"sizes": SIZES | change, "model": {}}, tmp_path / "sam.pth")
    with pytest.raises(UserError, match=rf"sam\.pth.*\(.*{sentence}.*\): choose the --model"):
        load_sam("custom", tmp_path / "sam.pth")


def test_a_sam_that_does_not_fit_its_file_is_not_built(tmp_path, monkeypatch):
    """Sizes within their limits, but of a model that the file does not hold: refused before it is built."""
    devices, built = [], build_sam

    def build(**sizes):
        devices.append(str(torch.get_default_device()))
        return built(**sizes)

    monkeypatch.setattr(checkpoints, "build_sam", build)
    for sizes, model in ((SIZES | {"depth": 4, "embed_dim": 64}, built(**SIZES).state_dict()), (SIZES, {}), (3, {})):
        torch.save({"sizes": sizes, "model": model}, tmp_path / "sam.pth")
        with pytest.raises(UserError, match=r"sam\.pth does not hold a custom model \(.*choose the --model"):
            load_sam("custom", tmp_path / "sam.pth")
    assert devices == ["meta", "meta"]
    torch.save({"sizes": SIZES, "model": built(**SIZES).state_dict()}, tmp_path / "sam.pth")
    assert load_sam("custom", tmp_path / "sam.pth").image_encoder.pos_embed.shape == (1, 4, 4, 32)
    assert devices == ["meta", "meta", "meta", "cpu"]
