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
from tools.workers import in_workers

MASKS = ("masks of step 9", "perfect regions (USES THE TRUTH)")  # whose masks refine


def refined(
    dataset: Dataset,
    folder: Path,
    split: str,
    rules: Sequence[Refinement],
    *,
    from_image: bool,
    maps: Path | None = None,
    workers: int = 0,
) -> dict[str, list[ConfusionMatrix]]:
    """The label maps of `folder` after each of `rules`, against the truth: name in `MASKS` -> a matrix for each rule.

    `from_image`: the classes that may be written are those of the image-level label, else those of the map. `maps` is
    the folder of the class maps for rule mean_cam: CAMs, or `folder` itself, which then holds probabilities. Each file
    is read once for all rules. Raises `UserError` for missing and damaged files.
    """
    ids = dataset.ids(split)
    image_labels = dataset.image_labels(split) if from_image else {}
    work = partial(_refined_patch, dataset=dataset, folder=folder, split=split, rules=rules, maps=maps)
    patches = [(id, image_labels.get(id)) for id in ids]
    counts = np.zeros((len(MASKS), len(rules), dataset.num_classes, dataset.num_classes + 1), np.int64)
    with Progress(len(ids), f"{folder.name} refined") as bar:
        for patch_counts in in_workers(work, patches, workers):
            counts += patch_counts
            bar.update()
    return {
        name: [ConfusionMatrix(dataset.num_classes, of_rule) for of_rule in of_masks]
        for name, of_masks in zip(MASKS, counts, strict=True)
    }


def _refined_patch(
    patch: tuple[str, np.ndarray | None],
    *,
    dataset: Dataset,
    folder: Path,
    split: str,
    rules: Sequence[Refinement],
    maps: Path | None,
) -> np.ndarray:
    """One patch, id and image-level label (K,) bool or None -> (2,R,K,K+1) int64: kinds of masks, rules, counts."""
    (id, image_label), num_classes = patch, dataset.num_classes
    truth = load_label(dataset.labels(split) / f"{id}.png", num_classes)
    label = load_label(folder / f"{id}.png", num_classes)
    classes = np.setdiff1d(label, [IGNORE]) if image_label is None else np.flatnonzero(image_label)
    class_maps = {}
    if maps:
        ids, values = load_maps(maps / f"{id}.npz", num_classes, truth.shape)
        class_maps = dict(zip(ids, values, strict=True))
    counts = []
    for masks in (load_masks(dataset.sam_masks(split) / f"{id}.npz", truth.shape), perfect_regions(truth, num_classes)):
        for rule in rules:
            matrix = ConfusionMatrix(num_classes)
            matrix.update(truth, rule(label, masks, classes, class_maps))
            counts.append(matrix.counts)
    return np.stack(counts).reshape(len(MASKS), len(rules), num_classes, num_classes + 1)


def on_true_background(dataset: Dataset, cams: Path, background: int) -> ConfusionMatrix:
    """The CAMs' argmax with the truth's background: how well the maps distinguish the other classes."""
    matrix = ConfusionMatrix(dataset.num_classes)
    ids = dataset.ids("train")
    with Progress(len(ids), "CAMs on the true background") as bar:
        for id in ids:
            truth = load_label(dataset.labels("train") / f"{id}.png", dataset.num_classes)
            classes, maps = load_maps(cams / f"{id}.npz", dataset.num_classes, truth.shape)
            others = classes != background
            prediction = np.full(truth.shape, background, np.uint8)
            if others.any():
                foreground = truth != background
                prediction[foreground] = classes[others][maps[others].argmax(0)][foreground]
            matrix.update(truth, prediction)
            bar.update()
    return matrix


def perfect_regions(truth: np.ndarray, num_classes: int) -> Masks:
    """The connected components of every class of the truth (H,W), as masks."""
    regions = [np.zeros((0, *truth.shape), bool)]
    for c in range(num_classes):
        components, count = ndimage.label(truth == c)
        regions.append(components == np.arange(1, count + 1)[:, None, None])
    return pack_masks(np.concatenate(regions))
