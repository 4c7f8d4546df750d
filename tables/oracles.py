"""What each refinement rule gives, and what each part could give at most: measures that open the TRUTH, for tables."""

from collections.abc import Iterator, Sequence
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


def refined(
    dataset: Dataset,
    folder: Path,
    split: str,
    refinements: Sequence[Refinement],
    *,
    image_labels: bool,
    maps: Path,
    perfect: bool,
) -> list[ConfusionMatrix]:
    """The label maps of `folder` after each refinement, against the truth.

    `image_labels`: the classes that may be written are those of the image-level label, else those of the map. `maps`:
    the folder whose class maps the rule mean_cam reads. `perfect` takes the truth's connected components as masks.
    """
    matrices, count = [ConfusionMatrix(dataset.num_classes) for _ in refinements], dataset.num_classes
    for id, present, truth in _truths(dataset, split, f"refining {folder.name}"):
        label = load_label(folder / f"{id}.png", count)
        masks = perfect_regions(truth, count) if perfect else load_masks(dataset.sam_masks(split) / f"{id}.npz")
        classes = present if image_labels else np.setdiff1d(label, [IGNORE])
        class_maps = None
        if any(refinement.rule == "mean_cam" for refinement in refinements):
            found = load_cams(maps / f"{id}.npz", count, label.shape, relative=maps != folder)
            class_maps = dict(zip(*found, strict=True))
        for matrix, refinement in zip(matrices, refinements, strict=True):
            matrix.update(truth, refinement(label, masks, classes, class_maps))
    return matrices


def on_true_background(dataset: Dataset, cams: Path, background: int) -> ConfusionMatrix:
    """The CAMs' argmax with the truth's background: how well the other classes are told apart."""
    matrix = ConfusionMatrix(dataset.num_classes)
    for id, _, truth in _truths(dataset, "train", "CAMs on the true background"):
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


def _truths(dataset: Dataset, split: str, what: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield id, the classes of its image-level label, and its label map."""
    labels, folder, ids = dataset.image_labels(split), dataset.labels(split), dataset.ids(split)
    with Progress(len(ids), what) as bar:
        for id in ids:
            yield id, np.flatnonzero(labels[id]), load_label(folder / f"{id}.png", dataset.num_classes)
            bar.update()
