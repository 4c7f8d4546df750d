"""Augmentation: random through (seed, epoch, patch) alone, resized by Pillow, and labels cropped like their images."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tools.augment import TrainingPatches, normalise, random_crop, to_tensor
from tools.labels import save_label

COLOURS = np.array([[255, 255, 255], [0, 0, 255], [0, 255, 0], [255, 0, 0]], np.uint8)
MEAN, STD = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])  # of ImageNet, red first


def crop_of(seed, size, patch, **options):
    return random_crop(np.random.default_rng(seed), size, patch, **options)


def pixels(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_normalisation():
    image = pixels(0, 5, 7, 3)
    x = normalise(to_tensor(image))
    assert x.dtype == torch.float32 and x.shape == (3, 5, 7)
    assert np.abs(x.numpy().transpose(1, 2, 0) - (image / 255 - MEAN) / STD).max() < 1e-6
    assert torch.equal(normalise(to_tensor(image)[None])[0], x)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), height=st.integers(3, 90), width=st.integers(3, 90), patch=st.integers(16, 48))
def test_image_and_label_are_cut_alike(seed, height, width, patch):
    """The augmentation a second time: Pillow's bicubic on the image and nearest on the labels, and NumPy."""
    image, label = pixels(seed, height, width, 3), pixels(seed + 1, height, width) % 4
    crop = crop_of(seed, (height, width), patch)
    x, ids = crop.image(image), crop.label(label)
    assert x.shape == (3, patch, patch) and x.dtype == torch.float32
    assert ids.shape == (patch, patch) and ids.dtype == torch.int64
    h, w = crop.size
    large, large_ids = (
        np.asarray(Image.fromarray(array).resize((w, h), resample)) for array, resample in ((image, 3), (label, 0))
    )
    if crop.mirrored:
        large, large_ids = large[:, ::-1], large_ids[:, ::-1]
    expected, expected_ids = np.zeros((patch, patch, 3)), np.full((patch, patch), 255)
    (top, left), (down, right) = [[side.start for side in sides] for sides in (crop.source, crop.target)]
    rows, columns = min(h, patch), min(w, patch)
    part = slice(top, top + rows), slice(left, left + columns)
    place = slice(down, down + rows), slice(right, right + columns)
    expected[place], expected_ids[place] = (large[part] / 255 - MEAN) / STD, large_ids[part]
    assert np.abs(x.numpy().transpose(1, 2, 0) - expected).max() < 1e-5
    assert np.array_equal(ids.numpy(), expected_ids)


def test_sides_are_whole_numbers_drawn_uniformly():
    """The longer side: each of 32 to 96 for a patch of 64, equally often. The shorter side keeps its share."""
    sizes = [crop_of(seed, (40, 80), 64).size for seed in range(4000)]
    counts = np.bincount([width for _, width in sizes], minlength=97)
    assert counts[:32].sum() == 0 and len(counts) == 97
    assert counts[32:].min() > 30 and counts[32:].max() < 100  # 61.5 expected, standard deviation 7.8
    assert all(height == round(width / 2) for height, width in sizes)
    assert {crop_of(seed, (80, 40), 64).size[0] for seed in range(4000)} == set(range(32, 97))
    assert {max(crop_of(seed, (50, 50), 33).size) for seed in range(2000)} == set(range(16, 50))


def ends(part):
    return part.start, part.stop


def test_places_are_drawn_uniformly():
    """Cut from any place where the side is longer than the patch, put at any place where it is shorter."""
    cut = [crop_of(seed, (64, 64), 64, scales=(1.5, 1.5)) for seed in range(2000)]
    placed = [crop_of(seed, (64, 64), 64, scales=(0.5, 0.5)) for seed in range(2000)]
    for axis in (0, 1):
        assert {ends(crop.target[axis]) for crop in cut} == {(0, 64)}
        assert {ends(crop.source[axis]) for crop in cut} == {(start, start + 64) for start in range(33)}
        assert {ends(crop.source[axis]) for crop in placed} == {(0, 32)}
        assert {ends(crop.target[axis]) for crop in placed} == {(start, start + 32) for start in range(33)}
    assert len({(crop.source[0].start, crop.source[1].start) for crop in cut}) > 700  # rows and columns independently
    assert 0.45 < np.mean([crop.mirrored for crop in cut + placed]) < 0.55


@pytest.fixture
def patches(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for id in "abc":
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{id}.png")
        save_label(tmp_path / "labels" / f"{id}.png", rng.integers(0, 4, (32, 32)).astype(np.uint8), COLOURS)

    def make(targets=tmp_path / "labels", seed=0):
        return TrainingPatches(list("abc"), tmp_path / "images", targets, 4, 24, seed)

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
    image_labels = {id: np.array([id == "a", True, False, id == "c"]) for id in "abc"}
    image, target = patches(image_labels)[3, 2]
    assert target.dtype == torch.float32 and target.tolist() == [0, 1, 0, 1]
    assert torch.equal(image, patches()[3, 2][0])  # the same crop whatever it is trained on
