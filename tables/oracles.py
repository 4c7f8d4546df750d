"""What the refinement rules give, and what each part could give at most: measures that open the TRUTH, for tables."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from scipy import ndimage

from PRC_SAM.refine import Refinement
from tools.dataset import Dataset
from tools.labels import IGNORE, load_label
from tools.map_files import load_maps
from tools.masks import Masks, load_masks, pack_masks
from tools.progress import Progress
from tools.scores import ConfusionMatrix
from tools.steps import STEPS
from tools.workers import in_workers

STEP_9, PERFECT = "masks of step 9", "perfect regions (USES THE TRUTH)"  # whose masks refine


def refined(
    dataset: Dataset, folder: Path, rules: Sequence[Refinement], from_image: bool, workers: int = 0
) -> dict[str, list[ConfusionMatrix]]:
    """The label maps of steps 3 or 6 after each of `rules`, against the truth: `STEP_9` and `PERFECT` -> a matrix for
    each rule.

    `from_image`: the classes that may be written are those of the image-level label, else those of the map. The rule
    mean_cam reads the CAMs beside `folder`, or the probabilities that step 6 kept. Each file is read once for all
    rules. Raises `UserError` for missing and damaged files.
    """
    split = STEPS[folder.name].split or "train"
    image_labels = dataset.image_labels(split) if from_image else {}
    patches = [(id, image_labels.get(id)) for id in dataset.ids(split)]
    work = partial(_refined_patch, dataset=dataset, folder=folder, split=split, rules=rules)
    totals = {name: [ConfusionMatrix(dataset.num_classes) for _ in rules] for name in (STEP_9, PERFECT)}
    with Progress(len(patches), f"{folder.name} refined") as bar:
        for matrices in in_workers(work, patches, workers):
            for (name, number), matrix in matrices.items():
                totals[name][number].counts += matrix.counts
            bar.update()
    return totals


def _refined_patch(
    patch: tuple[str, np.ndarray | None], dataset: Dataset, folder: Path, split: str, rules: Sequence[Refinement]
) -> dict[tuple[str, int], ConfusionMatrix]:
    """One patch, id and image-level label (K,) bool or None -> the kind of masks and number of a rule -> counts."""
    (id, image_label), num_classes = patch, dataset.num_classes
    truth = load_label(dataset.labels(split) / f"{id}.png", num_classes)
    label = load_label(folder / f"{id}.png", num_classes)
    classes = np.setdiff1d(label, [IGNORE]) if image_label is None else np.flatnonzero(image_label)
    class_maps = {}
    if any(rule.rule == "mean_cam" for rule in rules):
        maps = folder if folder.name == "segmentation" else folder.with_name("cams")
        class_maps = dict(zip(*load_maps(maps / f"{id}.npz", num_classes, truth.shape), strict=True))
    of_step_9 = load_masks(dataset.sam_masks(split) / f"{id}.npz", truth.shape)
    matrices = {}
    for name, masks in ((STEP_9, of_step_9), (PERFECT, perfect_regions(truth, num_classes))):
        for number, rule in enumerate(rules):
            matrix = ConfusionMatrix(num_classes)
            matrix.update(truth, rule(label, masks, classes, class_maps))
            matrices[name, number] = matrix
    return matrices


def on_true_background(dataset: Dataset, cams: Path, background: int) -> ConfusionMatrix:
    """The CAMs' argmax with the truth's background: how well the maps distinguish the other classes."""
    matrix = ConfusionMatrix(dataset.num_classes)
    ids = dataset.ids("train")
    with Progress(len(ids), "CAMs on the true background") as bar:
        for id in ids:
            truth = load_label(dataset.labels("train") / f"{id}.png", dataset.num_classes)
            classes, maps = load_maps(cams / f"{id}.npz", dataset.num_classes, truth.shape)
            maps[classes == background] = -1
            prediction = np.where(truth == background, background, classes[maps.argmax(axis=0)])
            matrix.update(truth, prediction.astype(np.uint8))
            bar.update()
    return matrix


def perfect_regions(truth: np.ndarray, num_classes: int) -> Masks:
    """The connected components of every class of the truth (H,W), as masks."""
    regions = [np.zeros((0, *truth.shape), bool)]
    for c in range(num_classes):
        components, count = ndimage.label(truth == c)
        regions.append(components == np.arange(1, count + 1)[:, None, None])
    return pack_masks(np.concatenate(regions))
