"""The classifier's view of the labels: average precision and doubts against float64 references, and damaged files."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.experiments import CLASSES, make_experiment
from tools.command import UserError
from tools.dataset import load_dataset
from tools.image_labels import write_image_labels
from tools.map_files import save_maps
from tools.review import average_precision, doubt, read_logits, review

CAMS = "experiments/tiny/run/cams"


def reference(labels, scores):
    """The area under precision over recall, threshold by threshold."""
    total, before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        chosen = [label for label, score in zip(labels, scores, strict=True) if score >= threshold]
        recall = sum(chosen) / sum(labels)
        total += (recall - before) * sum(chosen) / len(chosen)
        before = recall
    return total


@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=1, max_size=30))
def test_average_precision_equals_its_definition(pairs):
    labels, scores = map(list, zip(*pairs, strict=True))
    expected = reference(labels, scores) if any(labels) else np.nan
    precision = average_precision(np.array(labels), np.array(scores, float))
    assert precision == pytest.approx(expected, nan_ok=True)


@given(st.lists(st.tuples(st.booleans(), st.floats(-30, 30)), min_size=1, max_size=30))
def test_doubt_ranks_like_the_distance_between_label_and_probability(pairs):
    labels, logits = (np.array(values) for values in zip(*pairs, strict=True))
    distance = np.abs(labels - 1 / (1 + np.exp(-logits)))
    order = np.argsort(-doubt(labels, logits))
    assert (np.diff(distance[order]) <= 1e-12).all()
    assert ((doubt(labels, logits) > 0) == (np.where(labels, logits, -logits) < 0)).all()


@pytest.fixture
def root(tmp_path):
    """Five patches whose every second class is labelled, and a classifier that contradicts three of the labels."""
    root = make_experiment(tmp_path)
    labels = {id: np.array([True, False, True, False]) for id in "abcde"}
    write_image_labels(root / "datasets/tiny/train/image_labels.csv", tuple(CLASSES), labels)
    for id in "abcde":
        logits = np.where(labels[id], 4.0, -4.0)
        logits[3] = {"b": 2.0, "d": 0.5}.get(id, -4.0)
        logits[0] = -6.0 if id == "c" else logits[0]
        save_maps(root / CAMS / f"{id}.npz", "cams", np.array([0, 2]), [np.ones((2, 2, 2))], (32, 32), logits)
    return root


def test_a_review_names_the_strongest_doubts_first(root):
    result = review(load_dataset("tiny", root), root / CAMS)
    doubts = [(doubt.id, doubt.name, doubt.labelled, round(doubt.probability, 3)) for doubt in result.doubts]
    assert doubts == [("c", CLASSES[0], True, 0.002), ("b", "clutter", False, 0.881), ("d", "clutter", False, 0.622)]
    assert [(row.name, row.patches) for row in result.classes] == list(zip(CLASSES, [5, 0, 5, 0], strict=True))
    assert result.classes[2].average_precision == 1 and np.isnan(result.classes[3].average_precision)
    assert len(review(load_dataset("tiny", root), root / CAMS, most=2).doubts) == 2


def test_patches_without_logits_and_damaged_files(root):
    assert sorted(read_logits(root / CAMS, ["a", "b", "new"], 4)) == ["a", "b"]
    with pytest.raises(UserError, match=r"a\.npz .* 4 classes"):
        read_logits(root / CAMS, ["a"], 5)
    with pytest.raises(UserError, match="no file"):
        read_logits(root / CAMS, ["new"], 4)
    with np.load(root / CAMS / "a.npz") as arrays:
        old = {name: array for name, array in arrays.items() if name != "logits"}
    np.savez_compressed(root / CAMS / "a.npz", **old)
    with pytest.raises(UserError, match=r"a\.npz cannot be read .*logits"):
        read_logits(root / CAMS, ["a"], 4)
