"""A small made experiment with random errors, for the tests of the scores and of the report."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from report.stages import Stage
from tools.dataset import Dataset, load_dataset
from tools.image_labels import write_image_labels
from tools.labels import save_label
from tools.map_files import save_maps
from tools.masks import pack_masks, save_masks
from tools.runs import Run

EVIL = "<script>alert('x')</script>"
CLASSES = ["road", EVIL, "roof", "clutter"]
COLOURS = np.array([[255, 255, 255], [0, 0, 255], [0, 255, 0], [255, 0, 0]], np.uint8)
DESCRIPTION = f"""
title = "a | title & {EVIL}"
patch_size = 32
classes = [{", ".join(f'{{name = "{CLASSES[k]}", colour = {COLOURS[k].tolist()}}}' for k in range(4))}]
left_out_of_mean = ["clutter"]
[paper]
miou = 11.11
share_of_supervised = 22.22
supervised = 33.33
"""
STAGES = {
    "pseudo_labels": "train",
    "refined_pseudo_labels": "train",
    "segmentation": "test",
    "refined_segmentation": "test",
}


def write_run(folder, split, warnings=(), **notes):
    """Write the run.json of a step."""
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(
        constants={"split": split, "seed": 3, "backbone": "resnet18", "protocol": "clean", "weights": "/home/me/w.pth"},
        notes=notes,
        warnings=warnings,
        started=folder.name,
        seconds=1.5,
        finished=True,
    )
    (folder / "run.json").write_text(run.model_dump_json())


def make_experiment(root: Path) -> Path:
    """A data set of 5 + 5 patches and the experiments `run` and `supervised`, with random errors."""
    rng = np.random.default_rng(0)
    dataset, experiments = root / "datasets" / "tiny", root / "experiments" / "tiny"
    dataset.mkdir(parents=True)
    (dataset / "dataset.toml").write_text(DESCRIPTION)
    for split in ("train", "test"):
        for id in "abcde":
            truth = rng.integers(0, 4, (4, 4)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
            truth[:2] = 255
            for part in ("images", "labels"):
                (dataset / split / part).mkdir(parents=True, exist_ok=True)
            image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(image).save(dataset / split / "images" / f"{id}.png")
            save_label(dataset / split / "labels" / f"{id}.png", truth, COLOURS)
            save_masks(dataset / split / "sam_masks" / f"{id}.npz", pack_masks(rng.random((3, 32, 32)) > 0.5))
            folders = [experiments / "run" / name for name, of in STAGES.items() if of == split]
            folders += [experiments / "supervised" / "segmentation"] if split == "test" else []
            for folder in folders:
                wrong = (rng.random(truth.shape) < 0.4) | (truth == 255)
                save_label(folder / f"{id}.png", np.where(wrong, rng.integers(0, 4, truth.shape), truth), COLOURS)
    for id in "abcde":
        maps, logits = [rng.random((2, 2, 2))], rng.normal(size=4)
        save_maps(experiments / "run" / "cams" / f"{id}.npz", "cams", np.array([0, 2]), maps, (32, 32), logits)
    write_run(experiments / "run" / "cams", "train")
    for name, split in STAGES.items():
        write_run(experiments / "run" / name, split, **({"stand_in": "made masks"} if "refined" in name else {}))
    write_run(experiments / "supervised" / "segmentation", "test")
    write_run(experiments / "run" / "classifier", "train", [f"{EVIL}: average precision no better than chance"])
    precision = json.dumps({"average_precision": {"road": 0.5, EVIL: 0.25, "roof": None}})[1:-1]
    (experiments / "run" / "classifier" / "log.jsonl").write_text(
        f'{{"epoch": 1, "step": 9, "loss": 2.5, "lr": 0.1, {precision}}}\n'
        '{"epoch": 2, "step": 18, "loss": NaN, "lr": 0.05, "average_precision": {"road": 1}}\n'
        '{"epoch": 3, "step": 27, "loss": 0.5, "classification": 0.25, "lr": 0.0}\n{"epoch": 4, "lo'
    )
    return root


def make_refinable(root: Path, background: str = "") -> tuple[Dataset, Path]:
    """`make_experiment` with image-level labels, masks of 8 x 8 pixels and probabilities of step 6.

    Returns the data set and the folder of `run`.
    """
    make_experiment(root)
    if background:
        with open(root / "datasets" / "tiny" / "dataset.toml", "a") as file:
            file.write(f'[rules]\nbackground = "{background}"\n')
    dataset, folder, rng = load_dataset("tiny", root), root / "experiments" / "tiny" / "run", np.random.default_rng(1)
    blocks = np.arange(16).reshape(4, 4).repeat(8, 0).repeat(8, 1) == np.arange(16)[:, None, None]
    for split in ("train", "test"):
        labels = {id: np.array([1, 1, 0, 1]) for id in "abcde"}
        write_image_labels(dataset.image_labels_file(split), dataset.classes, labels)
        write_run(dataset.sam_masks(split), split)
        for id in "abcde":
            save_masks(dataset.sam_masks(split) / f"{id}.npz", pack_masks(np.roll(blocks, 3, axis=2)))
    for id in "abcde":
        maps = [rng.random((4, 8, 8))]
        save_maps(folder / "segmentation" / f"{id}.npz", "probabilities", np.arange(4), maps, (32, 32))
    return dataset, folder


def scores_of(root, experiment="run"):
    return json.loads((root / "experiments" / "tiny" / experiment / "scores" / "scores.json").read_text())


def scored(experiment, stage, split, confusion):
    """A stage of scores.json."""
    return Stage(
        experiment=experiment,
        stage=stage,
        title=stage,
        split=split,
        images=1,
        partial=False,
        made=("", 0),
        is_bound=experiment == "supervised",
        confusion=confusion,
    )
