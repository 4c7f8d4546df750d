"""The confusion matrix and its scores against loops over pixels, and kappa by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools import scores
from tools.scores import ConfusionMatrix

K = 4


def pixels(values=(*range(K), 255), size=40):
    return st.lists(st.tuples(st.sampled_from(values), st.sampled_from(values)), max_size=size).map(
        lambda pairs: np.array(pairs, np.uint8).reshape(-1, 2).T
    )


def matrix_of(pairs, num_classes=K):
    matrix = ConfusionMatrix(num_classes)
    matrix.update(*pairs)
    return matrix


def by_loops(truth, prediction, left_out, protocol):
    """The definitions, pixel by pixel and class by class, in Python numbers."""
    counted = [
        (t, p)
        for t, p in zip(truth.tolist(), prediction.tolist(), strict=True)
        if t != 255 and t not in left_out and not (protocol == "released" and p in left_out)
    ]
    found = {name: [math.nan] * K for name in ("iou", "f1", "precision", "recall")} | {"support": [0] * K}
    for k in range(K):
        hit = sum(t == k and p == k for t, p in counted)
        missed = sum(t == k and p != k for t, p in counted)
        false = sum(t != k and p == k for t, p in counted)
        found["support"][k] = hit + missed
        if k in left_out:
            continue
        if hit + missed + false:
            found["iou"][k], found["f1"][k] = hit / (hit + missed + false), 2 * hit / (2 * hit + missed + false)
        if hit + false:
            found["precision"][k] = hit / (hit + false)
        if hit + missed:
            found["recall"][k] = hit / (hit + missed)
    for mean, name in (("miou", "iou"), ("mean_f1", "f1")):
        defined = [value for value in found[name] if not math.isnan(value)]
        if name == "f1" and protocol == "released":
            defined = [value for value in defined if value > 0]
        found[mean] = sum(defined) / len(defined) if defined else math.nan
    n = len(counted)
    found["overall_accuracy"] = observed = sum(t == p for t, p in counted) / n if n else math.nan
    chance = sum(sum(t == k for t, _ in counted) * sum(p == k for _, p in counted) for k in range(K)) / n**2 if n else 1
    found["kappa"] = (observed - chance) / (1 - chance) if chance != 1 else math.nan
    return found


@settings(max_examples=300, deadline=None)
@given(pixels(), st.sets(st.integers(0, K - 1), max_size=2), st.sampled_from(scores.PROTOCOLS))
def test_equals_the_definitions(pairs, left_out, protocol):
    found = matrix_of(pairs).scores(left_out, protocol)
    expected = by_loops(*pairs, left_out, protocol)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-12, equal_nan=True, err_msg=name)


@settings(max_examples=100, deadline=None)
@given(pixels(), pixels(), st.sampled_from([np.uint8, np.int64, np.int32]))
def test_merging_equals_counting_together(first, second, dtype):
    together = matrix_of(np.concatenate([first, second], axis=1).astype(dtype))
    apart = matrix_of(first).merge(matrix_of(second))
    assert np.array_equal(together.counts, apart.counts) and apart.counts.dtype == np.int64


def test_absent_classes():
    found = matrix_of((np.array([0, 0, 0, 0], np.uint8), np.array([0, 0, 0, 2], np.uint8))).scores()
    assert found["iou"][0] == 0.75 and found["iou"][2] == 0  # predicted but absent from the truth
    assert np.isnan(found["iou"][[1, 3]]).all()  # absent from both: not in the mean
    assert found["miou"] == 0.375


def test_no_class_predicted_is_an_error_and_ignored_truth_is_not_counted():
    truth, prediction = np.array([[1, 1], [255, 255]], np.uint8), np.array([[1, 255], [0, 255]], np.uint8)
    matrix = matrix_of((truth, prediction))
    assert matrix.counts.sum() == 2 and matrix.counts[1, K] == 1
    assert matrix.scores()["overall_accuracy"] == 0.5 and matrix.scores()["iou"][1] == 0.5


def test_kappa_by_hand():
    """Cohen's example: 20 + 15 of 50 agree, 0.7 observed, 0.5 by chance."""
    matrix = ConfusionMatrix(2)
    matrix.counts += np.array([[20, 5, 0], [10, 15, 0]])
    assert matrix.scores()["overall_accuracy"] == pytest.approx(0.7, abs=1e-15)
    assert matrix.scores()["kappa"] == pytest.approx(0.4, abs=1e-15)


def test_the_released_protocol_flatters():
    truth = np.array([0] * 8 + [3] * 2, np.uint8)
    prediction = np.array([0] * 4 + [3] * 4 + [0, 3], np.uint8)
    matrix = matrix_of((truth, prediction))
    assert matrix.scores([3])["miou"] == 0.5  # predicted clutter is an error, true clutter does not count
    assert matrix.scores([3], "released")["miou"] == 1.0
    assert matrix.scores()["iou"][3] == 1 / 6


def test_the_released_mean_f1_leaves_out_classes_without_a_hit():
    """Class 1 is predicted but absent from the truth; class 2 is in the truth but never predicted: both have no hit."""
    matrix = matrix_of((np.array([0, 0, 0, 2], np.uint8), np.array([0, 0, 1, 0], np.uint8)))
    f1 = 2 * 2 / (2 * 2 + 1 + 1)
    assert matrix.scores()["mean_f1"] == pytest.approx(f1 / 3)
    assert matrix.scores(protocol="released")["mean_f1"] == pytest.approx(f1)
    assert matrix.scores()["miou"] == matrix.scores(protocol="released")["miou"] == pytest.approx((2 / 4) / 3)
    assert math.isnan(matrix_of(np.array([[0], [1]], np.uint8)).scores(protocol="released")["mean_f1"])


def test_counts_beyond_32_bits_and_beyond_float32():
    one = ConfusionMatrix(2)
    side = 4097  # 4097 * 4097 is odd and above 2^24, where float32 skips odd numbers
    one.update(np.zeros((side, side), np.uint8), np.zeros((side, side), np.uint8))
    assert one.counts[0, 0] == side * side
    many = ConfusionMatrix(2)
    for _ in range(10):
        many.merge(one)
    for _ in range(5):
        many.merge(many)
    assert many.counts[0, 0] == 320 * side * side > 2**32
    many.counts[1, 1] = many.counts[0, 0]
    assert many.scores()["kappa"] == 1 and many.scores()["support"][0] == 320 * side * side


def test_chunks_do_not_change_the_counts(monkeypatch):
    pairs = np.random.default_rng(0).integers(0, K, (2, 50, 30)).astype(np.uint8)
    whole = matrix_of(pairs).counts
    monkeypatch.setattr(scores, "CHUNK", 7)
    assert np.array_equal(matrix_of(pairs).counts, whole)
    assert np.array_equal(matrix_of([array.T for array in pairs]).counts, whole)  # not contiguous


@pytest.mark.parametrize(
    ("truth", "prediction", "words"),
    [
        ([0, 1], [0], "shape"),
        ([0, 4], [0, 1], "truth holds the id 4"),
        ([0, 1], [0, 9], "prediction holds the id 9"),
        ([0, -1], [0, 1], "truth must hold"),
        ([0, 1], [0, 300], "prediction must hold"),
        ([0.0], [0], "truth must hold"),
    ],
)
def test_wrong_arrays_are_refused_and_add_nothing(truth, prediction, words):
    matrix = ConfusionMatrix(K)
    with pytest.raises(ValueError, match=words):
        matrix.update(np.array(truth), np.array(prediction))
    assert not matrix.counts.any()


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="ignore"):
        ConfusionMatrix(6, ignore=3)
    with pytest.raises(ValueError, match="cannot add"):
        ConfusionMatrix(3).merge(ConfusionMatrix(4))
    with pytest.raises(ValueError, match="protocol"):
        ConfusionMatrix(3).scores(protocol="best")


def test_nothing_counted_is_nan_without_a_warning(recwarn):
    found = ConfusionMatrix(3).scores()
    assert all(math.isnan(found[name]) for name in ("miou", "mean_f1", "overall_accuracy", "kappa"))
    assert not recwarn.list
