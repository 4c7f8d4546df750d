"""Steps 1 to 7 on patches small enough for one processor: outputs, records, the two protocols."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from tests.steps import STEPS, TEST, TRAIN, experiment, record, same_results, step
from tools.command import UserError
from tools.dataset import load_dataset
from tools.labels import load_label
from tools.map_files import load_maps


@pytest.mark.parametrize("script", STEPS)
def test_outputs_and_record(finished, script):
    name, constants, ids, suffix = STEPS[script]
    folder = experiment(finished) / name
    run = record(folder)
    assert run["finished"] and run["script"] == f"{script}.py" and run["seconds"] > 0
    assert run["constants"].items() >= ({"dataset": "tiny", "experiment": "prc"} | constants).items()
    assert run["device"] == "cpu" and run["packages"]["torch"] and script in run["command"]
    files = {path.name for path in folder.glob(f"*{suffix}")} - {"contact_sheet.png"}
    assert files == ({f"{id}{suffix}" for id in ids} if ids else {"model.pt", "checkpoint.pt"})
    assert run["files"] == len(files)
    with Image.open(folder / "contact_sheet.png") as sheet:
        assert sheet.width > 500 and sheet.height > 500
    assert not list(folder.rglob(".*tmp*"))


def test_each_step_knows_what_it_was_made_from(finished):
    folder = experiment(finished)
    for name, sources in {
        "cams": ["classifier"],
        "pseudo_labels": ["cams"],
        "refined_pseudo_labels": ["pseudo_labels"],
        "segmenter": ["refined_pseudo_labels"],
        "segmentation": ["segmenter"],
        "refined_segmentation": ["segmentation"],
    }.items():
        reads = record(folder / name)["reads"]
        assert {source: record(folder / source)["started"] for source in sources}.items() <= reads.items()
    assert "sam_masks" in record(folder / "refined_pseudo_labels")["reads"]
    for name in ("refined_pseudo_labels", "segmenter", "segmentation", "refined_segmentation"):
        assert "felzenszwalb" in record(folder / name)["notes"]["stand_in"]  # a stand-in is reported to the end


def test_trainings_log_their_losses(finished):
    (row,) = [json.loads(line) for line in (experiment(finished) / "classifier" / "log.jsonl").read_text().splitlines()]
    assert row["loss"] == pytest.approx(row["classification"] + 0.1 * row["reconstruction"], rel=1e-5)
    assert row["step"] == 2 and "train_miou" not in row
    assert (experiment(finished) / "segmenter" / "log.jsonl").read_text().count("\n") == 1


def test_pseudo_labels_hold_the_classes_of_the_image_alone(finished):
    dataset = load_dataset("tiny", finished)
    labels = dataset.image_labels("train")
    for id in TRAIN:
        classes, maps = load_maps(experiment(finished) / "cams" / f"{id}.npz", 3, (64, 64))
        assert classes.tolist() == np.flatnonzero(labels[id]).tolist() and maps.shape == (len(classes), 64, 64)
        assert maps.min() >= 0 and maps.max() <= 1
        for stage in ("pseudo_labels", "refined_pseudo_labels"):
            found = load_label(experiment(finished) / stage / f"{id}.png", 3)
            assert found.shape == (64, 64) and set(np.unique(found)) <= set(classes)  # no ignored pixel either
    for id in TEST:
        for stage in ("segmentation", "refined_segmentation"):
            assert load_label(experiment(finished) / stage / f"{id}.png", 3).max() < 3


def test_clean_needs_no_pixel_label(finished, copy, capsys):
    """Without the labels of both splits, and from the same seed, every byte is the same."""
    for split in ("train", "test"):
        shutil.rmtree(copy / "datasets" / "tiny" / split / "labels")
    shutil.rmtree(copy / "experiments")
    for script, (name, _, _, suffix) in STEPS.items():
        step(script, copy)
        assert same_results(experiment(finished) / name, experiment(copy) / name, suffix), name
    assert "could not be renewed" not in capsys.readouterr().err  # the report needs none either


def test_the_released_protocol(copy):
    dataset = load_dataset("tiny", copy)
    for script in ("train_classification", "train_segmentation"):
        step(script, copy, protocol="released", overwrite=True, epochs=2)
        folder = experiment(copy) / STEPS[script][0]
        rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert len(rows) == 2 and all(0 <= row["train_miou"] <= 100 for row in rows)
        best = max(rows, key=lambda row: row["train_miou"])["epoch"]
        assert torch.load(folder / "model.pt", weights_only=True)["epoch"] == best
        assert record(folder)["constants"]["protocol"] == "released"
    step("infer_classification", copy, experiment="borrower", classifier="prc")
    assert record(experiment(copy, "borrower") / "cams")["notes"]["protocol_of_the_steps"] == "released"
    labels = dataset.image_labels("test")
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
    step("infer_classification", copy, split="test")
    step("make_pseudo_labels", copy, split="test")
    step("generate_refined_pseudo", copy, split="test")
    step("inference_segmentation", copy, split="train")
    for name, ids in (
        ("cams_test", TEST),
        ("pseudo_labels_test", TEST),
        ("refined_pseudo_labels_test", TEST),
        ("segmentation_train", TRAIN),
    ):
        assert record(experiment(copy) / name)["files"] == len(ids)
    assert record(experiment(copy) / "cams")["files"] == 10  # untouched


def test_the_fully_supervised_bound(copy):
    step("train_segmentation", copy, experiment="supervised", labels="truth")
    folder = experiment(copy, "supervised") / "segmenter"
    assert record(folder)["notes"]["supervision"] and "stand_in" not in record(folder)["notes"]
    shutil.rmtree(copy / "datasets" / "tiny" / "train" / "labels")
    with pytest.raises(UserError, match="has no label of 10 train images: train_0, train_1, train_2, and 7 more"):
        step("train_segmentation", copy, experiment="again", labels="truth")


def test_other_constants_change_the_maps(finished, copy):
    """PRC, IR and the CRF can be switched off, and each is felt."""
    step("train_classification", copy, experiment="plain", iterations=0, ir_weight=0.0)
    step("infer_classification", copy, experiment="plain")
    step("make_pseudo_labels", copy, experiment="plain", crf_iterations=0)
    assert not same_results(experiment(finished) / "classifier", experiment(copy, "plain") / "classifier", ".pt")
    for id in TRAIN:
        classes, maps = load_maps(experiment(copy, "plain") / "cams" / f"{id}.npz", 3, (64, 64))
        found = load_label(experiment(copy, "plain") / "pseudo_labels" / f"{id}.png", 3)
        assert np.array_equal(found, classes[maps.argmax(0)])


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
