"""IOS against its sequential definition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

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


@st.composite
def cases(draw):
    size = draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    ids = [*range(draw(st.integers(1, 4))), 255]
    label = draw(hnp.arrays(np.uint8, size, elements=st.sampled_from(ids)))
    masks = draw(hnp.arrays(bool, (draw(st.integers(0, 5)), *size)))
    pool = [*masks, *(label == c for c in ids), np.ones(size, bool), np.zeros(size, bool)]  # equal ones, all, none
    order = draw(st.lists(st.sampled_from(range(len(pool))), max_size=8))
    masks = np.array([pool[index] for index in order], bool).reshape(-1, *size)
    classes = draw(st.lists(st.sampled_from([0, 1, 2, 3, 250]), unique=True))
    tau = draw(st.one_of(st.sampled_from([0.0, 0.1, 0.3, 0.5, 2 / 3, 0.85, 0.9, 1.0]), st.floats(0, 1)))
    return label, masks, classes, tau


@given(cases())
def test_equals_the_sequential_definition(case):
    label, masks, classes, tau = case
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


def test_ignored_pixels_belong_to_no_class_but_are_covered():
    label = np.array([[255, 255, 1, 1, 1, 1, 1]], np.uint8)
    mask = np.array([[[False, True, True, True, False, False, False]]])
    np.testing.assert_array_equal(refine(label, mask, 1, 0.6), [[255, 1, 1, 1, 1, 1, 1]])


def test_wrong_arguments():
    label, masks = np.zeros((4, 4), np.uint8), np.ones((1, 4, 4), bool)
    for tau in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match="tau"):
            refine(label, masks, 0, tau)
