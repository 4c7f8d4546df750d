"""The measures that open the truth, against loops over patches, masks and classes."""

import numpy as np
import pytest
from scipy import ndimage

from PRC_SAM.refine import Refinement
from tables.oracles import PERFECT, STEP_9, on_true_background, refined
from tests.experiments import make_refinable
from tests.test_ios import literal
from tests.test_refine import reference
from tools.command import UserError
from tools.labels import load_label
from tools.map_files import load_maps
from tools.masks import load_masks

RULES = [Refinement("ios", 0.9, 0), Refinement("ios", 0.1, 0), Refinement("sepl", 0.9, 0), Refinement("vote", 0.9, 0)]


@pytest.fixture
def experiment(tmp_path):
    return make_refinable(tmp_path)


def counted(truth, prediction):
    """(4,5) int64, pixel by pixel; the last column counts 255."""
    counts = np.zeros((4, 5), np.int64)
    for row, column in zip(truth.ravel().tolist(), prediction.ravel().tolist(), strict=True):
        if row != 255:
            counts[row, min(column, 4)] += 1
    return counts


@pytest.mark.parametrize(
    ("split", "source", "from_image"), [("train", "pseudo_labels", True), ("test", "segmentation", False)]
)
def test_every_rule_with_both_kinds_of_masks(experiment, split, source, from_image):
    dataset, folder = experiment
    maps = folder / ("cams" if split == "train" else source)
    rules = [*RULES, Refinement("mean_cam", 0.9, 0)]
    matrices = refined(dataset, folder / source, rules, from_image)
    expected = np.zeros((2, 5, 4, 5), np.int64)
    for id in "abcde":
        truth = load_label(dataset.labels(split) / f"{id}.png", 4)
        label = load_label(folder / source / f"{id}.png", 4)
        classes = [0, 1, 3] if from_image else np.unique(label)
        values = dict(zip(*load_maps(maps / f"{id}.npz", 4, (32, 32)), strict=True))
        of_step_9 = load_masks(dataset.sam_masks(split) / f"{id}.npz").unpack()
        of_truth = [
            part == n for c in range(4) for part, count in [ndimage.label(truth == c)] for n in range(1, count + 1)
        ]
        for kind, masks in enumerate((of_step_9, np.array(of_truth))):
            for number, rule in enumerate(RULES):
                if rule.rule == "ios":
                    result = literal(label, masks, classes, rule.tau)
                else:
                    result = reference(rule.rule, label, masks, classes, background=rule.background)
                expected[kind, number] += counted(truth, result)
            expected[kind, 4] += counted(truth, reference("mean_cam", label, masks, classes, values))
    for kind, name in enumerate((STEP_9, PERFECT)):
        np.testing.assert_array_equal([matrix.counts for matrix in matrices[name]], expected[kind])
    assert (expected[0] != expected[1]).any()


def test_a_missing_file_is_named(experiment):
    dataset, folder = experiment
    (dataset.sam_masks("train") / "c.npz").unlink()
    with pytest.raises(UserError, match=r"c\.npz is missing"):
        refined(dataset, folder / "pseudo_labels", RULES, from_image=True)


def test_the_background_of_the_truth_is_given_to_the_cams(experiment):
    dataset, folder = experiment
    expected = np.zeros((4, 5), np.int64)
    for id in "abcde":
        truth = load_label(dataset.labels("train") / f"{id}.png", 4)
        expected += counted(truth, np.where(truth == 0, 0, 2))  # the CAMs hold classes 0 and 2
    np.testing.assert_array_equal(on_true_background(dataset, folder / "cams", 0).counts, expected)
