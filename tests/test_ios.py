"""IOS against its sequential definition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from PRC_SAM.ios import intersection_optimisation
from tools.command import UserError
from tools.masks import pack_masks


def literal(label, masks, classes, tau):
    """The definition word by word: classes ascending, masks in order, one write after the other."""
    result = label.copy()
    for c in sorted(classes):
        region = label == c
        for mask in masks:
            overlap = int((region & mask).sum())
            if overlap == 0:
                continue
            r_region, r_mask = overlap / int(region.sum()), overlap / int(mask.sum())
            if max(r_region, r_mask) >= tau:
                result[region if r_region >= r_mask else mask] = c
    return result


def random_case(rng, size):
    """Label map of 255 and a few classes; overlapping, equal, empty and full masks, also none; classes to write."""
    ids = [*range(rng.integers(1, 5)), 255]
    label = rng.choice(ids, size).astype(np.uint8)
    scattered = rng.random((5, *size)) < rng.random((5, 1, 1))
    regions = np.array([label == c for c in ids])
    nearly_regions = regions ^ (rng.random(regions.shape) < 0.1)
    special = np.array([np.ones(size, bool), np.zeros(size, bool)])
    pool = np.concatenate([scattered, regions, nearly_regions, special])
    masks = pool[rng.integers(0, len(pool), rng.integers(0, 12))]
    classes = rng.permutation([0, 1, 2, 3, 250])[: rng.integers(0, 6)]
    return label, masks, classes.tolist()


SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.sampled_from([(1, 1), (3, 5), (8, 8), (9, 14), (2, 70), (4, 64), (3, 130)])  # masks of 1 to 7 words
TAUS = st.one_of(st.sampled_from([0.0, 0.1, 0.3, 0.5, 2 / 3, 0.85, 0.9, 1.0]), st.floats(0, 1))


@given(SEEDS, SIZES, TAUS)
def test_equals_the_sequential_definition(seed, size, tau):
    label, masks, classes = random_case(np.random.default_rng(seed), size)
    before = label.copy()
    expected = literal(label, masks, classes, tau)
    np.testing.assert_array_equal(intersection_optimisation(label, pack_masks(masks), classes, tau), expected)
    np.testing.assert_array_equal(label, before)


def refine(label, masks, c, tau):
    return intersection_optimisation(label, pack_masks(masks), [c], tau)


def test_ratio_of_exactly_tau_counts():
    label = np.zeros((4, 10), np.uint8)
    label[0], label[1, 0] = 1, 1  # P of 11 pixels
    mask = np.zeros((1, 4, 10), bool)
    mask[0, 0, :9] = mask[0, 2, 0] = True  # S of 10 pixels, 9 of them in P
    assert refine(label, mask, 1, 0.9)[2, 0] == 1
    assert refine(label, mask, 1, np.nextafter(0.9, 1))[2, 0] == 0


def test_region_as_large_as_the_mask_is_written_on_itself():
    label = np.array([[1, 1, 0, 0]], np.uint8)
    mask = np.array([[[False, True, True, False]]])
    np.testing.assert_array_equal(refine(label, mask, 1, 0.5), label)


def test_wrong_arguments():
    label, masks = np.zeros((4, 4), np.uint8), np.ones((1, 4, 4), bool)
    for tau in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match="tau"):
            refine(label, masks, 0, tau)
