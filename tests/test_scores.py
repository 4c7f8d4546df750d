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
    result = {name: [math.nan] * K for name in ("iou", "f1", "precision", "recall")} | {"support": [0] * K}
    for k in range(K):
        hit = sum(t == k and p == k for t, p in counted)
        missed = sum(t == k and p != k for t, p in counted)
        false = sum(t != k and p == k for t, p in counted)
        result["support"][k] = hit + missed
        if k in left_out:
            continue
        if hit + missed + false:
            result["iou"][k], result["f1"][k] = hit / (hit + missed + false), 2 * hit / (2 * hit + missed + false)
        if hit + false:
            result["precision"][k] = hit / (hit + false)
        if hit + missed:
            result["recall"][k] = hit / (hit + missed)
    for mean, name in (("miou", "iou"), ("mean_f1", "f1")):
        defined = [value for value in result[name] if not math.isnan(value)]
        if name == "f1" and protocol == "released":
            defined = [value for value in defined if value > 0]
        result[mean] = sum(defined) / len(defined) if defined else math.nan
    n = len(counted)
    result["overall_accuracy"] = observed = sum(t == p for t, p in counted) / n if n else math.nan
    chance = sum(sum(t == k for t, _ in counted) * sum(p == k for _, p in counted) for k in range(K)) / n**2 if n else 1
    result["kappa"] = (observed - chance) / (1 - chance) if chance != 1 else math.nan
    return result


@settings(max_examples=300)
@given(pixels(), st.sets(st.integers(0, K - 1), max_size=2), st.sampled_from(scores.PROTOCOLS))
def test_equals_the_definitions(pairs, left_out, protocol):
    result = matrix_of(pairs).scores(left_out, protocol)
    expected = by_loops(*pairs, left_out, protocol)
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(result[name], value, rtol=0, atol=1e-12, equal_nan=True, err_msg=name)


def test_counts_beyond_float32():
    matrix, side = ConfusionMatrix(2), 4097  # 4097 * 4097 is odd and above 2^24, where float32 skips odd numbers
    matrix.update(np.zeros((side, side), np.uint8), np.zeros((side, side), np.uint8))
    assert matrix.counts[0, 0] == side * side


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_chunks_and_types_do_not_change_the_counts(monkeypatch, dtype):
    pairs = np.random.default_rng(0).integers(0, K, (2, 50, 30)).astype(dtype)
    expected = matrix_of(pairs).counts
    monkeypatch.setattr(scores, "CHUNK", 7)
    assert np.array_equal(matrix_of([array.T for array in pairs]).counts, expected)  # not contiguous


@pytest.mark.parametrize(
    ("truth", "prediction", "word"),
    [([0, 1], [0], "shape"), ([0, 4], [0, 1], "truth"), ([0, -1], [0, 1], "truth"), ([0, 1], [0, 9], "prediction")],
)
def test_wrong_arrays_are_refused_and_add_nothing(truth, prediction, word):
    matrix = ConfusionMatrix(K)
    with pytest.raises(ValueError, match=word):
        matrix.update(np.array(truth), np.array(prediction))
    with pytest.raises(ValueError, match="truth"):
        matrix.update(np.array([0.0]), np.array([0]))
    assert not matrix.counts.any()


def test_a_matrix_from_counts_is_a_copy_and_counts_must_fit():
    counts = np.eye(3, 4, dtype=np.int64)
    matrix = ConfusionMatrix(3, counts)
    matrix.update(np.array([2]), np.array([255]))
    assert (matrix.counts - counts).tolist() == [[0] * 4, [0] * 4, [0, 0, 0, 1]]
    with pytest.raises(ValueError, match="shape"):
        ConfusionMatrix(3, np.eye(3))


def test_nothing_counted_is_nan_without_a_warning(recwarn):
    result = ConfusionMatrix(3).scores()
    assert all(math.isnan(result[name]) for name in ("miou", "mean_f1", "overall_accuracy", "kappa"))
    assert not recwarn.list
