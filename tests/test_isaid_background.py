"""iSAID's patches: the background must stay below its largest share; exactly that share is too much."""

import numpy as np
import pytest

from datasetsprocess import isaid_split
from tests.test_splitting import describe, open_scene
from tools.dataset import load_dataset


@pytest.mark.parametrize(("split", "most"), [("train", 192), ("test", 64)])
def test_the_limit_itself_is_too_much(tmp_path, split, most):
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
