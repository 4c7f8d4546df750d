"""The image-level labels as the trained classifier sees them: which labels it contradicts, and how well it ranks.

The classifier was trained on these labels, so it agrees with most of them, wrong ones included, and the more so the
longer it was trained (docs/own_data.md).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import expit

from tools.command import check
from tools.dataset import Dataset
from tools.map_files import load_logits


@dataclass(frozen=True)
class Doubt:
    """One label that the classifier contradicts: whether the patch has the class, and the classifier's probability."""

    id: str
    name: str
    labelled: bool
    probability: float


@dataclass(frozen=True)
class ClassReview:
    """One class: how many patches are labelled with it, and the average precision of its logits, NaN without any."""

    name: str
    patches: int
    average_precision: float


@dataclass(frozen=True)
class Review:
    """What the report shows: each class, and the labels that the classifier contradicts most."""

    classes: list[ClassReview]
    doubts: list[Doubt]


def read_logits(cams: Path, ids: Iterable[str], num_classes: int) -> dict[str, np.ndarray]:
    """id -> (K,) float32: the mean logits that step 2 stored. Patches that were added since have none.

    Raises `UserError` when a file is damaged or has another number of classes, and when no patch has a file.
    """
    logits = {id: load_logits(cams / f"{id}.npz") for id in ids if (cams / f"{id}.npz").exists()}
    check(bool(logits), f"{cams} has no file of the train patches: run step 2 on this data set again with --overwrite")
    for id, values in logits.items():
        check(
            values.shape == (num_classes,),
            f"{cams / id}.npz has logits of {values.size} classes, but the data set has {num_classes}: run steps 1 and "
            "2 again with --overwrite",
        )
    return logits


def doubt(labels: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """How much the classifier contradicts each label; above 0 it does. labels bool and logits of one shape.

    It is the logit where the label is without the class, and minus the logit where the label has it. This ranks as the
    distance between label and probability does, but does not saturate.
    """
    return np.where(labels, -logits, logits)


def average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """Mean, over the positives, of the precision among all that score at least as high. labels bool, scores: (N,).

    NaN where there is no positive. Equal scores count as one step.
    """
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(labels[order])
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # of each group of equal scores
    precision, new_hits = hits[last] / (last + 1), np.diff(hits[last], prepend=0)
    return float(precision @ new_hits / hits[-1]) if hits[-1] else float("nan")


def review(dataset: Dataset, cams: Path, most: int = 20) -> Review:
    """The classifier's logits in a folder of step 2 against the labels of the train split."""
    image_labels = dataset.image_labels("train")
    stored = read_logits(cams, image_labels, dataset.num_classes)
    ids = sorted(stored)
    labels = np.stack([image_labels[id] for id in ids])
    logits = np.stack([stored[id] for id in ids]).astype(float)
    strength = doubt(labels, logits)
    order = np.argsort(-strength, axis=None, kind="stable")[:most]
    doubts = []
    for row, k in zip(*np.unravel_index(order, strength.shape), strict=True):
        if strength[row, k] > 0:
            probability = float(expit(logits[row, k]))
            doubts.append(Doubt(ids[row], dataset.classes[k], bool(labels[row, k]), probability))
    classes = []
    for k, name in enumerate(dataset.classes):
        classes.append(ClassReview(name, int(labels[:, k].sum()), average_precision(labels[:, k], logits[:, k])))
    return Review(classes, doubts)
