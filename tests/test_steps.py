"""Steps 1 to 7 on patches small enough for one processor: outputs, records, the two protocols."""

import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from tests.steps import STEPS, TEST, TRAIN, experiment, record, same_results, step
from tools.command import UserError
from tools.dataset import load_dataset
from tools.labels import load_label
from tools.logs import read_log
from tools.map_files import load_maps


@pytest.mark.parametrize("script", STEPS)
def test_outputs_and_record(finished, script):
    name, constants, ids, suffix = STEPS[script]
    folder = experiment(finished) / name
    run = record(folder)
    assert run["finished"] and run["script"] == f"{script}.py" and script in run["command"] and run["seconds"] > 0
    assert run["constants"].items() >= ({"dataset": "tiny", "experiment": "prc"} | constants).items()
    assert run["device"] == run["hardware"]["device"] == "cpu" and run["packages"]["torch"]
    files = {path.name for path in folder.glob(f"*{suffix}")} - {"contact_sheet.png"}
    assert files == ({f"{id}{suffix}" for id in ids} if ids else {"model.pt", "checkpoint.pt"})
    assert run["files"] == len(files) and not list(folder.rglob(".*tmp*"))
    with Image.open(folder / "contact_sheet.png") as sheet:
        assert sheet.width > 500 and sheet.height > 500


def test_each_step_knows_what_it_was_made_from(finished):
    folder = experiment(finished)
    names = [name for name, *_ in STEPS.values()]
    for source, name in pairwise(names):
        assert record(folder / name)["reads"][source] == record(folder / source)["started"]
    for name in names[3:]:
        assert "felzenszwalb" in record(folder / name)["notes"]["stand_in"]  # a stand-in is reported to the end
    assert "sam_masks" in record(folder / "refined_pseudo_labels")["reads"]
    for name, constant, value in (("classifier", "gamma", 0.7), ("refined_pseudo_labels", "tau", 0.9)):
        run = record(folder / name)
        assert run["constants"][constant] == value and run["origins"] == {constant: "default"}


def test_pseudo_labels_hold_the_classes_of_the_image_alone(finished):
    labels = load_dataset("tiny", finished).image_labels("train")
    for id in TRAIN:
        classes, maps = load_maps(experiment(finished) / "cams" / f"{id}.npz", 3, (64, 64))
        assert classes.tolist() == np.flatnonzero(labels[id]).tolist() and maps.shape == (len(classes), 64, 64)
        for stage in ("pseudo_labels", "refined_pseudo_labels"):
            label = load_label(experiment(finished) / stage / f"{id}.png", 3)
            assert label.shape == (64, 64) and set(np.unique(label)) <= set(classes)  # no ignored pixel either
    for id in TEST:
        for stage in ("segmentation", "refined_segmentation"):
            assert load_label(experiment(finished) / stage / f"{id}.png", 3).max() < 3


def test_clean_needs_no_pixel_label(finished, copy, capsys):
    """Without the labels of both splits, from the same seed, every byte is the same. Each step renews the report."""
    for split in ("train", "test"):
        shutil.rmtree(copy / "datasets" / "tiny" / split / "labels")
    shutil.rmtree(copy / "experiments")
    page = experiment(copy) / "scores" / "report.html"
    for script, (name, _, _, suffix) in STEPS.items():
        page.unlink(missing_ok=True)
        step(script, copy)
        assert same_results(experiment(finished) / name, experiment(copy) / name, suffix), name
        assert page.exists(), name
    assert "not made yet: step" not in page.read_text()
    assert "could not be renewed" not in capsys.readouterr().err


def test_the_released_protocol(copy):
    for script in ("train_classification", "train_segmentation"):
        step(script, copy, protocol="released", overwrite=True, epochs=2)
        folder = experiment(copy) / STEPS[script][0]
        rows = read_log(folder / "log.jsonl")
        assert len(rows) == 2 and all(0 <= row["train_miou"] <= 100 for row in rows)
        best = max(rows, key=lambda row: row["train_miou"])["epoch"]
        assert torch.load(folder / "model.pt", weights_only=True)["epoch"] == best
    step("infer_classification", copy, experiment="borrower", classifier="prc")
    assert record(experiment(copy, "borrower") / "cams")["notes"]["protocol_of_the_steps"] == "released"
    labels = load_dataset("tiny", copy).image_labels("test")
    step("inference_segmentation", copy, overwrite=True)
    step("generate_refined_seg", copy, protocol="released", overwrite=True)
    for id in TEST:  # a class that is missing from the truth is never added
        before, after = (
            load_label(experiment(copy) / stage / f"{id}.png", 3) for stage in ("segmentation", "refined_segmentation")
        )
        assert set(np.unique(after[after != before])) <= set(np.flatnonzero(labels[id]))
    shutil.rmtree(copy / "datasets" / "tiny" / "train" / "labels")
    with pytest.raises(UserError, match=r"labels.train_0\.png is missing"):
        step("train_classification", copy, protocol="released", experiment="other")


def test_the_other_split(copy):
    for script, split in (
        ("infer_classification", "test"),
        ("make_pseudo_labels", "test"),
        ("generate_refined_pseudo", "test"),
        ("inference_segmentation", "train"),
    ):
        step(script, copy, split=split)
        count = record(experiment(copy) / f"{STEPS[script][0]}_{split}")["files"]
        assert count == len(TEST if split == "test" else TRAIN)
    assert record(experiment(copy) / "cams")["files"] == 10  # untouched


def test_the_fully_supervised_bound(copy):
    step("train_segmentation", copy, experiment="supervised", labels="truth")
    notes = record(experiment(copy, "supervised") / "segmenter")["notes"]
    assert notes["supervision"] and "stand_in" not in notes
    shutil.rmtree(copy / "datasets" / "tiny" / "train" / "labels")
    with pytest.raises(UserError, match=r"no label of 10 train images.*7 more"):
        step("train_segmentation", copy, experiment="again", labels="truth")


def test_other_constants_change_the_maps(finished, copy):
    """PRC, IR and the CRF can be switched off, and each is felt."""
    step("train_classification", copy, experiment="plain", iterations=0, ir_weight=0.0)
    step("infer_classification", copy, experiment="plain")
    step("make_pseudo_labels", copy, experiment="plain", crf_iterations=0)
    assert not same_results(experiment(finished) / "classifier", experiment(copy, "plain") / "classifier", ".pt")
    for id in TRAIN:
        classes, maps = load_maps(experiment(copy, "plain") / "cams" / f"{id}.npz", 3, (64, 64))
        label = load_label(experiment(copy, "plain") / "pseudo_labels" / f"{id}.png", 3)
        assert np.array_equal(label, classes[maps.argmax(0)])


def test_without_ir_the_classifier_does_not_depend_on_prc(copy):
    """What the ablation relies on: one classifier serves the rows with and without PRC, PRC switched in step 2."""
    step("train_classification", copy, experiment="with", ir_weight=0.0, epochs=2)
    step("train_classification", copy, experiment="without", ir_weight=0.0, epochs=2, iterations=0)
    states = [torch.load(experiment(copy, name) / "classifier" / "model.pt")["model"] for name in ("with", "without")]
    learnt = [name for name in states[0] if not name.startswith("prc.")]
    assert learnt and all(torch.equal(states[0][name], states[1][name]) for name in learnt)

    step("infer_classification", copy, experiment="with")
    step("infer_classification", copy, experiment="shared", classifier="without", iterations=1)
    step("infer_classification", copy, experiment="without")
    cams = {
        name: load_maps(experiment(copy, name) / "cams" / f"{TRAIN[1]}.npz", 3, (64, 64))[1]
        for name in ("with", "shared", "without")
    }
    # weight decay alone moved the projection of one of them, and its length does not count
    np.testing.assert_allclose(cams["with"], cams["shared"], atol=2e-3)
    assert np.abs(cams["with"] - cams["without"]).max() > 0.01
    with pytest.raises(UserError, match="iterations is -1"):
        step("infer_classification", copy, experiment="shared", iterations=-1)
