"""Warnings of worthless results: given where the facts show one, silent for good results."""

import numpy as np
import pytest

from tests.steps import experiment, record, step
from tools.dataset import load_dataset
from tools.labels import save_label
from tools.result_checks import check_classifier, check_losses, check_shares, patch_shares, pixel_shares

PRESENT = {"road": 0.4, "roof": 0.5, "land": 1.0}
GOOD = [
    {"classification": 0.7, "average_precision": {"road": 0.5, "roof": 0.5, "land": 1.0}},
    {"classification": 0.2, "average_precision": {"road": 0.9, "roof": 0.8, "land": 1.0}},
]


def test_a_good_training_gives_no_warning():
    assert check_classifier(GOOD, PRESENT) == [] and check_classifier([], PRESENT) == []
    assert check_losses([{"loss": 2.0}, {"loss": 1.0}]) == [] and check_losses([{"loss": 2.0}]) == []


@pytest.mark.parametrize(("last", "warned"), [(0.99, True), (0.97, False), (2.0, True)])
def test_a_loss_that_did_not_fall(last, warned):
    assert bool(check_losses([{"loss": 1.0}, {"loss": 0.3}, {"loss": last}])) == warned


def test_a_classifier_that_guesses():
    warnings = check_classifier([{"classification": 0.8}, {"classification": 1.35}], PRESENT)
    assert len(warnings) == 2 and "did not fall" in warnings[0] and "1.35" in warnings[1] and "0.69" in warnings[1]


def test_a_class_that_the_classifier_does_not_find():
    """A fifth of the way from chance to 1 or to 0 is enough; a class in every patch cannot be told apart."""
    rows = [GOOD[0], GOOD[1] | {"average_precision": {"road": 0.45, "roof": 0.9, "land": 1.0}}]
    (sentence,) = check_classifier(rows, PRESENT)
    assert "road (0.45, chance 0.40)" in sentence and "roof" not in sentence and "land" not in sentence
    for precision, warned in ((0.86, False), (0.85, True)):
        row = {"classification": 0.2, "average_precision": {"road": precision}}
        assert bool(check_classifier([GOOD[0], row], {"road": 0.82})) == warned


@pytest.mark.parametrize(
    ("road", "roof", "learnt", "words"),
    [
        (0.05, 0.25, {}, ()),
        (0.0005, 0.25, {}, ()),  # above a thousandth of the pixels of the patches that have the class
        (0.02, 0.01, {}, ("land", "97.0%")),
        (0.0, 0.2, {}, ("road", "in 40% of the train patches", "0.00% of the pixels")),
        (0.0019, 0.3, {"road": 0.04}, ("road", "0.19%", "step 5 on 4.00%")),  # less than a twentieth of what it learnt
        (0.0021, 0.3, {"road": 0.04}, ()),
    ],
)
def test_shares_of_label_maps(road, roof, learnt, words):
    shares = {"road": road, "roof": roof, "land": 1 - road - roof}
    warnings = check_shares(shares, PRESENT, "do this", learnt)
    assert len(warnings) == bool(words) and all(word in warnings[0] and "do this" in warnings[0] for word in words)


def test_rare_classes_and_a_data_set_of_one_class():
    assert check_shares({"road": 0.0, "land": 0.8}, {"road": 0.01}, "") == []  # rare in the patches, too
    assert check_shares({"land": 1.0}, {"land": 1.0}, "") == []


def test_step_6_compares_with_the_labels_of_step_5(copy, monkeypatch):
    present = patch_shares(load_dataset("tiny", copy).image_labels("train"), load_dataset("tiny", copy).classes)
    name = max(present, key=present.__getitem__)
    shares = {"refined_pseudo_labels": 0.9, "segmentation": 0.04}
    monkeypatch.setattr("tools.step.pixel_shares", lambda folder, ids, classes: {name: shares[folder.name]})
    step("inference_segmentation", copy, overwrite=True)
    (sentence,) = record(experiment(copy) / "segmentation")["warnings"]
    assert "4.00%" in sentence and "90.00%" in sentence and "pseudo-labels" in sentence


def test_the_shares_are_counted(tmp_path):
    colours, rng = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8), np.random.default_rng(0)
    maps = {id: rng.choice([0, 1, 255], (8, 9)).astype(np.uint8) for id in "abc"}
    for id, ids in maps.items():
        save_label(tmp_path / f"{id}.png", ids, colours)
    stacked = np.stack(list(maps.values()))
    shares = pixel_shares(tmp_path, ["a", "b", "c", "missing"], ["x", "y", "z"])
    assert shares == pytest.approx({"x": (stacked == 0).sum() / (stacked < 3).sum(), "y": 1 - shares["x"], "z": 0})
    labels = {"a": np.array([True, False]), "b": np.array([True, True])}
    assert patch_shares(labels, ["x", "y"]) == {"x": 1.0, "y": 0.5}


def test_a_step_prints_and_keeps_its_warnings(copy, capsys):
    """One epoch of a tiny classifier with a rate far too high finds nothing; the warning is in run.json too."""
    step("train_classification", copy, experiment="wild", lr=3.0, epochs=2, batch_size=2)
    warnings = record(experiment(copy, "wild") / "classifier")["warnings"]
    assert warnings and f"warning: {warnings[0]}" in capsys.readouterr().err
