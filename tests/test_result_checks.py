"""Warnings of worthless results: given where the facts show one, silent for good results."""

import math

import numpy as np
import pytest

from tests.steps import account, experiment, step
from tools.dataset import load_dataset
from tools.labels import save_label
from tools.result_checks import check_classifier, check_losses, check_shares, patch_shares, pixel_shares

PRESENT = {"road": 0.4, "roof": 0.5, "land": 1.0}
GOOD = [
    {"classification": 0.7, "average_precision": {"road": 0.5, "roof": 0.5, "land": 1.0}},
    {"classification": 0.2, "average_precision": {"road": 0.9, "roof": 0.8, "land": 1.0}},
]


def test_a_good_training_gives_no_warning():
    assert check_classifier(GOOD, PRESENT) == [] and check_losses([{"loss": 2.0}, {"loss": 1.0}]) == []
    assert check_losses([{"loss": 2.0}]) == [] and check_losses([]) == [] and check_classifier([], PRESENT) == []


@pytest.mark.parametrize(("last", "warned"), [(1.0, True), (0.99, True), (0.97, False), (2.0, True)])
def test_a_loss_that_did_not_fall(last, warned):
    found = check_losses([{"loss": 1.0}, {"loss": 0.3}, {"loss": last}])
    assert bool(found) == warned
    assert not found or f"did not fall: 1 in the first epoch, {last:.3g} in the last" in found[0]


def test_a_classifier_that_guesses():
    (fallen, guessing) = check_classifier([{"classification": 0.8}, {"classification": 1.35}], PRESENT)
    assert "the classification did not fall" in fallen
    assert f"ended at 1.35, and guessing gives {math.log(2):.2f}" in guessing and "few hundred patches" in guessing


def test_a_class_that_the_classifier_does_not_find():
    """Chance is the share of patches with the class; a class in every patch cannot be told apart, and is left out."""
    rows = [GOOD[0], GOOD[1] | {"average_precision": {"road": 0.45, "roof": 0.9, "land": 1.0}}]
    (sentence,) = check_classifier(rows, PRESENT)
    assert "road (0.45, chance 0.40)" in sentence and "roof" not in sentence and "land" not in sentence


def test_a_frequent_class_that_the_classifier_finds():
    """Of 82 % the average precision cannot become 1.2 times; a fifth of the way to 1 is enough."""
    for found, warned in ((0.98, False), (0.86, False), (0.85, True)):
        row = {"classification": 0.2, "average_precision": {"road": found}}
        assert bool(check_classifier([GOOD[0], row], {"road": 0.82})) == warned


def test_shares_of_label_maps():
    assert check_shares({"road": 0.05, "roof": 0.25, "land": 0.7}, PRESENT, "do this") == []
    (one,) = check_shares({"road": 0.02, "roof": 0.01, "land": 0.97}, PRESENT, "do this")
    assert "one class, land, covers 97.0% of all pixels: do this" in one
    (absent,) = check_shares({"road": 0.0, "roof": 0.2, "land": 0.8}, PRESENT, "do this")
    assert "hardly ever found: road (in 40% of the train patches, on 0.00% of the pixels): do this" in absent
    assert check_shares({"road": 0.0, "land": 0.8}, {"road": 0.01}, "") == []  # rare in the patches, too
    assert check_shares({"land": 1.0}, {"land": 1.0}, "") == []  # a data set of one class


def test_a_class_that_the_segmenter_lost():
    """It learnt from labels with 4 % road and finds less than a twentieth of that."""
    learnt = {"road": 0.04, "roof": 0.26, "land": 0.7}
    (lost,) = check_shares({"road": 0.0019, "roof": 0.3, "land": 0.69}, PRESENT, "do this", learnt)
    assert "road (in 40% of the train patches, on 0.19% of the pixels, in the labels of step 5 on 4.00%): do th" in lost
    assert check_shares({"road": 0.0021, "roof": 0.3, "land": 0.69}, PRESENT, "do this", learnt) == []


def test_step_6_compares_with_the_labels_of_step_5(copy, monkeypatch):
    present = patch_shares(load_dataset("tiny", copy).image_labels("train"), load_dataset("tiny", copy).classes)
    name = max(present, key=present.__getitem__)
    shares = {"refined_pseudo_labels": 0.9, "segmentation": 0.04}
    monkeypatch.setattr("tools.step.pixel_shares", lambda folder, ids, classes: {name: shares[folder.name]})
    step("inference_segmentation", copy, overwrite=True)
    (sentence,) = account(experiment(copy) / "segmentation")["warnings"]
    assert "on 4.00% of the pixels, in the labels of step 5 on 90.00%): compare with the pseudo-labels" in sentence


def test_the_shares_are_counted(tmp_path):
    colours, rng = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8), np.random.default_rng(0)
    maps = {id: rng.choice([0, 1, 255], (8, 9)).astype(np.uint8) for id in "abc"}
    for id, ids in maps.items():
        save_label(tmp_path / f"{id}.png", ids, colours)
    every = np.stack(list(maps.values()))
    found = pixel_shares(tmp_path, ["a", "b", "c", "missing"], ["x", "y", "z"])
    assert found == pytest.approx(
        {"x": (every == 0).sum() / (every < 3).sum(), "y": (every == 1).sum() / (every < 3).sum(), "z": 0}
    )
    labels = {"a": np.array([True, False]), "b": np.array([True, True])}
    assert patch_shares(labels, ["x", "y"]) == {"x": 1.0, "y": 0.5}


def test_a_step_prints_and_keeps_its_warnings(copy, capsys):
    """One epoch of a tiny classifier with a rate far too high finds nothing; the warning is in run.json too."""
    step("train_classification", copy, experiment="wild", lr=3.0, epochs=2, batch_size=2)
    found = account(experiment(copy, "wild") / "classifier")["warnings"]
    assert found and all(f"warning: {sentence}" in capsys.readouterr().err for sentence in found[:1])
