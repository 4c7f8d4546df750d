"""Augmentation: random through (seed, epoch, patch) alone, and the label goes where the image goes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from tools.augment import MEAN, STD, TrainingPatches, augment, normalise, to_tensor
from tools.command import UserError
from tools.labels import save_label

COLOURS = np.array([[255, 255, 255], [0, 0, 255], [0, 255, 0], [255, 0, 0]], np.uint8)


def grey(image):
    """Normalised (3,S,S) -> (S,S) grey values 0 to 255 of an image with three equal channels."""
    mean, std = (torch.tensor(value)[:, None, None] for value in (MEAN, STD))
    return ((image * std + mean) * 255).mean(0)


def coded(height, width, block=8):
    """An image of blocks whose grey value tells the class: 40 + 50 x class of 4."""
    rng = np.random.default_rng(height * 100 + width)
    label = (
        rng.integers(0, 4, (-(-height // block), -(-width // block))).repeat(block, 0).repeat(block, 1)[:height, :width]
    )
    image = np.repeat((40 + 50 * label)[..., None], 3, 2).astype(np.uint8)
    return to_tensor(image), torch.from_numpy(label.astype(np.uint8))


def test_normalisation():
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    found = normalise(to_tensor(image))
    expected = (image / 255 - np.array(MEAN)) / np.array(STD)
    assert found.dtype == torch.float32 and found.shape == (3, 5, 7)
    assert np.abs(found.numpy().transpose(1, 2, 0) - expected).max() < 1e-6
    assert torch.equal(normalise(to_tensor(image)[None])[0], found)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(3, 6), columns=st.integers(3, 6), patch=st.integers(16, 48))
def test_the_label_follows_the_image(seed, rows, columns, patch):
    image, label = coded(16 * rows, 16 * columns, 16)
    found, ids = augment(np.random.default_rng(seed), image, label, patch)
    assert found.shape == (3, patch, patch) and found.dtype == torch.float32 and ids.shape == (patch, patch)
    assert set(ids.unique().tolist()) <= {*label.unique().tolist(), 255}  # nearest: no new ids
    outside = ids == 255
    assert (found[:, outside] == 0).all()  # zeros after the normalisation, where there is no image
    # inside a block, away from the blur at its outline, the grey value must be that of the label
    largest, smallest = (F.max_pool2d(sign * ids.float()[None], 9, 1, 4)[0] for sign in (1, -1))
    inner = (largest == -smallest) & ~outside
    inner[:4], inner[-4:], inner[:, :4], inner[:, -4:] = False, False, False, False  # what was cut off blurs in here
    assert ((grey(found) - (40.0 + 50.0 * ids))[inner].abs() < 4).all()


def test_the_blocks_are_seen():
    """The comparison above looks at a good part of the patch, not at nothing."""
    image, label = coded(64, 64, 16)
    _, ids = augment(np.random.default_rng(0), image, label, 64, scale=(1.5, 1.5))
    assert (ids != 255).all() and len(ids.unique()) == 4


def test_scale_range_and_place():
    """What is left of a plain label tells the size: uniform in 0.5 to 1.5 of the patch, anywhere in it."""
    image, label = to_tensor(np.full((40, 80, 3), 99, np.uint8)), torch.zeros(40, 80, dtype=torch.uint8)
    widths, heights, starts = [], [], set()
    for seed in range(300):
        _, ids = augment(np.random.default_rng(seed), image, label, 64)
        rows, columns = (ids == 0).any(1).nonzero()[:, 0], (ids == 0).any(0).nonzero()[:, 0]
        heights.append(len(rows)), widths.append(len(columns))
        assert (ids[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] == 0).all()
        starts.add(int(rows[0]))
    assert min(widths) in range(32, 36) and max(widths) == 64
    assert 0.4 < np.mean(np.array(widths) < 64) < 0.6
    assert min(heights) in range(16, 18) and max(heights) in range(46, 49)  # the shorter side keeps its share
    assert min(starts) <= 1 and max(starts) >= 40  # at the top as well as at the bottom
    tall = augment(np.random.default_rng(0), image.transpose(1, 2), None, 64, scale=(0.5, 0.5))[0]
    assert ((tall != 0).any(0).any(1).sum(), (tall != 0).any(0).any(0).sum()) == (32, 16)  # the longer side counts


def test_flips_about_half_the_time():
    image, label = coded(32, 32)
    label[:, :16], label[:, 16:] = 0, 1
    flipped = [
        int(augment(np.random.default_rng(seed), image, label, 32, scale=(1, 1))[1][0, 0]) for seed in range(400)
    ]
    assert 160 < sum(flipped) < 240


def test_full_size_is_the_image_itself():
    image, label = coded(32, 32)
    found = {
        tuple(augment(np.random.default_rng(seed), image, label, 32, scale=(1, 1))[1].flatten().tolist())
        for seed in range(20)
    }
    assert found == {tuple(label.flatten().tolist()), tuple(label.flip(-1).flatten().tolist())}
    found, none = augment(np.random.default_rng(0), image, None, 32, scale=(1, 1))
    assert none is None and any(torch.equal(found, normalise(image.flip(-1) if flip else image)) for flip in (0, 1))


@pytest.fixture
def patches(tmp_path):
    rng = np.random.default_rng(0)
    for id in "abc":
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{id}.png")
        save_label(tmp_path / "labels" / f"{id}.png", rng.integers(0, 4, (32, 32)).astype(np.uint8), COLOURS)

    def make(targets=tmp_path / "labels", seed=0):
        return TrainingPatches(list("abc"), tmp_path / "images", targets, 4, 24, seed)

    make.folder = tmp_path
    return make


def test_patches_depend_on_seed_epoch_and_index_alone(patches):
    first, again = patches(), patches()
    images = {}
    for key in [(0, 0), (0, 1), (1, 0), (0, 2)]:
        np.random.seed(sum(key))  # noqa: NPY002 - the global states must have no say
        torch.manual_seed(sum(key))
        images[key], label = first[key]
        _, _ = again[(5, 1)], again[(2, 2)]  # neither may what was drawn before
        assert torch.equal(again[key][0], images[key]) and torch.equal(again[key][1], label)
        assert label.dtype == torch.int64 and label.shape == (24, 24)
    assert not torch.equal(images[0, 0], images[1, 0])
    assert not torch.equal(patches(seed=1)[0, 0][0], images[0, 0])


def test_image_level_labels(patches):
    given = {id: np.array([id == "a", True, False, id == "c"]) for id in "abc"}
    image, target = patches(given)[3, 2]
    assert target.dtype == torch.float32 and target.tolist() == [0, 1, 0, 1]
    assert torch.equal(image, patches()[3, 2][0])  # the same crop whatever it is trained on


def test_bad_patches(patches):
    folder = patches.folder
    save_label(folder / "labels" / "a.png", np.zeros((32, 31), np.uint8), COLOURS)
    with pytest.raises(UserError, match=r"a\.png has 31 x 32 pixels, but its image has 32 x 32"):
        patches()[0, 0]
    save_label(folder / "labels" / "b.png", np.full((32, 32), 4, np.uint8), COLOURS)
    with pytest.raises(UserError, match="holds the class id 4, but there are 4 classes"):
        patches()[0, 1]
    (folder / "images" / "c.png").write_bytes((folder / "images" / "c.png").read_bytes()[:600])
    with pytest.raises(UserError, match=r"c\.png cannot be read as an image"):
        patches()[0, 2]
