"""Where the rules of the three data sets turn: exactly at a share, among ignored pixels, and in enlarged labels."""

import numpy as np
import pytest

from datasetsprocess import isaid_split, potsdam_patch_split, vaihingen_patch_split
from tests.test_splitting import describe, open_scene
from tools.dataset import load_dataset
from tools.labels import IGNORE


@pytest.mark.parametrize(("split", "most"), [("train", 192), ("test", 64)])
def test_isaid_s_largest_share_of_background_is_too_much(tmp_path, split, most):
    """A scene of one patch of 256 pixels; the shares are numbers that floating point holds exactly."""
    describe(
        tmp_path,
        "small",
        'base = "isaid"\npatch_size = 16\n[rules]\nbackground = "background"\npatches_per_scene = [1]\ntries = 3\n'
        "max_background = {train = 0.75, test = 0.25}\n",
    )
    dataset = load_dataset("small", tmp_path)
    for background, expected in ((most - 1, 1), (most, 0), (most + 1, 0)):
        ids = np.full(256, 9)
        ids[:background] = 0
        scene, _ = open_scene(dataset, ids.reshape(16, 16), split, tmp_path)
        assert len(list(isaid_split.patches(scene))) == expected, background


def test_potsdam_s_shares_are_of_all_pixels_of_the_tile(tmp_path):
    """A tenth of a tile of 400 pixels is 40, however many pixels are ignored."""
    describe(tmp_path, "small", 'base = "potsdam"\npatch_size = 20\n')
    for pixels, versions in ((40, 4), (39, 0)):
        ids = np.full(400, IGNORE)
        ids[:pixels], ids[40:100] = 1, 0
        scene, _ = open_scene(load_dataset("small", tmp_path), ids.reshape(20, 20), "train", tmp_path)
        assert len(list(potsdam_patch_split.patches(scene))) == versions, pixels


def test_vaihingen_s_zoom_takes_the_nearest_label():
    """No id appears that the crop does not hold, and each pixel has that of the crop's pixel over which it lies."""
    rng = np.random.default_rng(0)
    image, ids = rng.integers(0, 256, (16, 16, 3)).astype(np.uint8), rng.choice([0, 4], (16, 16)).astype(np.uint8)
    for seed in range(20):
        _, found = vaihingen_patch_split.zoom(image, ids, 6, 8, np.random.default_rng(seed))
        expected = [
            ids[np.ix_(y + places, x + places)]
            for side in (6, 7, 8)
            for places in [((np.arange(16) + 0.5) * side / 16).astype(int)]
            for y in range(17 - side)
            for x in range(17 - side)
        ]
        assert any(np.array_equal(found, each) for each in expected), seed
