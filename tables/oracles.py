"""What the refinement rules give, and what each part could give at most: measures that open the TRUTH, for tables."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from scipy import ndimage

from PRC_SAM.refine import Refinement
from tools.cams import load_cams
from tools.dataset import Dataset
from tools.labels import IGNORE, load_label
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
    labels, ids = dataset.image_labels(split), dataset.ids(split)
    work = partial(_refined_patch, dataset=dataset, folder=folder, split=split, rules=rules, maps=maps)
    items = [(id, np.flatnonzero(labels[id]) if from_image else None) for id in ids]
    counts = np.zeros((len(MASKS), len(rules), dataset.num_classes, dataset.num_classes + 1), np.int64)
    with Progress(len(ids), f"{folder.name} refined") as bar:
        for found in in_workers(work, items, workers):
            counts += found
            bar.update()
    return {
        name: [_matrix(dataset.num_classes, each) for each in of_masks]
        for name, of_masks in zip(MASKS, counts, strict=True)
    }


def _refined_patch(
    item: tuple[str, np.ndarray | None],
    *,
    dataset: Dataset,
    folder: Path,
    split: str,
    rules: Sequence[Refinement],
    maps: Path | None,
) -> np.ndarray:
    """(2,R,K,K+1) int64: counts of one patch with both kinds of masks and each rule."""
    (id, classes), num_classes = item, dataset.num_classes
    truth = load_label(dataset.labels(split) / f"{id}.png", num_classes)
    label = load_label(folder / f"{id}.png", num_classes)
    if classes is None:
        classes = np.setdiff1d(label, [IGNORE])
    class_maps = None
    if maps:
        class_maps = dict(zip(*load_cams(maps / f"{id}.npz", num_classes, truth.shape, maps != folder), strict=True))
    counts = []
    for masks in (load_masks(dataset.sam_masks(split) / f"{id}.npz", truth.shape), perfect_regions(truth, num_classes)):
        for rule in rules:
            matrix = ConfusionMatrix(num_classes)
            matrix.update(truth, rule(label, masks, classes, class_maps))
            counts.append(matrix.counts)
    return np.stack(counts).reshape(len(MASKS), len(rules), num_classes, num_classes + 1)


def _matrix(num_classes: int, counts: np.ndarray) -> ConfusionMatrix:
    matrix = ConfusionMatrix(num_classes)
    matrix.counts += counts
    return matrix


def on_true_background(dataset: Dataset, cams: Path, background: int) -> ConfusionMatrix:
    """The CAMs' argmax with the truth's background: how well the maps distinguish the other classes."""
    matrix = ConfusionMatrix(dataset.num_classes)
    for id, truth in _truths(dataset, "train", "CAMs on the true background"):
        classes, maps = load_cams(cams / f"{id}.npz", dataset.num_classes, truth.shape)
        others = classes != background
        found = classes[others][maps[others].argmax(0)] if others.any() else np.full(truth.shape, background)
        matrix.update(truth, np.where(truth == background, background, found).astype(np.uint8))
    return matrix


def perfect_regions(truth: np.ndarray, num_classes: int) -> Masks:
    """The connected components of every class of the truth (H,W), as masks."""
    components = [ndimage.label(truth == c) for c in range(num_classes)]
    regions = [numbered == i for numbered, count in components for i in range(1, count + 1)]
    return pack_masks(np.stack(regions) if regions else np.zeros((0, *truth.shape), bool))


def _truths(dataset: Dataset, split: str, what: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield id and the truth (H,W) of each patch."""
    ids = dataset.ids(split)
    with Progress(len(ids), what) as bar:
        for id in ids:
            yield id, load_label(dataset.labels(split) / f"{id}.png", dataset.num_classes)
            bar.update()
