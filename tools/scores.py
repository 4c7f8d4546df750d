"""Scores of label maps against the truth, from one confusion matrix over all images (method section 8)."""

from collections.abc import Iterable

import cv2
import numpy as np
from numpy.typing import ArrayLike

from tools.labels import IGNORE

PROTOCOLS = ("clean", "released")
CHUNK = 1 << 24  # pixels: OpenCV counts in float32, which is exact up to here


class ConfusionMatrix:
    """Pixel counts of truth against prediction, summed image by image in 64 bits.

    `counts` is (K, K+1) int64: rows are the truth, columns the prediction. The last column counts pixels that have a
    class in the truth but 255 (ignore) in the prediction: they are errors. Pixels whose truth is 255 are not counted.
    It begins at zero, or with a copy of `counts`. Raises `ValueError` for counts of another shape.
    """

    def __init__(self, num_classes: int, counts: ArrayLike | None = None):
        shape = (num_classes, num_classes + 1)
        self.num_classes = num_classes
        self.counts = np.zeros(shape, np.int64) if counts is None else np.array(counts, np.int64)
        if self.counts.shape != shape:
            raise ValueError(f"the counts have shape {self.counts.shape}, but {num_classes} classes need {shape}")

    def update(self, truth: np.ndarray, prediction: np.ndarray) -> None:
        """Add one image or batch: two integer arrays of the same shape that hold class ids or 255 (ignore).

        Raises `ValueError` for different shapes and for other ids, and then adds nothing.
        """
        truth, prediction = _bytes(truth, "truth"), _bytes(prediction, "prediction")
        if truth.shape != prediction.shape:
            raise ValueError(f"the truth has shape {truth.shape}, the prediction {prediction.shape}")
        truth, prediction = truth.reshape(-1), prediction.reshape(-1)
        pairs = np.zeros((256, 256), np.int64)
        for start in range(0, truth.size, CHUNK):
            part = [array[start : start + CHUNK] for array in (truth, prediction)]
            pairs += cv2.calcHist(part, [0, 1], None, [256, 256], [0, 256, 0, 256]).astype(np.int64)
        ids = [*range(self.num_classes), IGNORE]
        for name, pixels in (("truth", pairs.sum(axis=1)), ("prediction", pairs.sum(axis=0))):
            pixels[ids] = 0
            if pixels.any():
                raise ValueError(
                    f"the {name} holds the id {pixels.nonzero()[0][0]}, but there are {self.num_classes} "
                    f"classes and {IGNORE} for ignore"
                )
        self.counts += pairs[: self.num_classes, ids]

    def scores(self, left_out: Iterable[int] = (), protocol: str = "clean") -> dict:
        """Fractions from 0 to 1. For each class (K,): `iou`, `f1`, `precision`, `recall`, and `support`, its pixels in
        the truth. Over all classes: `miou`, `mean_f1`, `overall_accuracy`, `kappa`.

        A score that is not defined is NaN. A class that occurs neither in the truth nor in the prediction has no
        defined score, and the means leave it out. A class that is predicted but absent from the truth has an IoU and F1
        of 0, and the means include it.

        Pixels whose truth is a class of `left_out` are not counted, and the scores of that class are NaN. A pixel of
        another class that is predicted as a left-out class is an error.

        `protocol="released"` differs in two points, both of which raise the scores: pixels predicted as a left-out
        class are not counted, and `mean_f1` is the mean over the classes with a hit. The released code also leaves out
        class 16, which does not exist among iSAID's ids 0 to 15 and so changes nothing.
        """
        if protocol not in PROTOCOLS:
            raise ValueError(f'protocol is "{protocol}", but it must be one of {", ".join(PROTOCOLS)}')
        left_out = sorted(set(left_out))
        counts = self.counts.copy()
        counts[left_out] = 0
        if protocol == "released":
            counts[:, left_out] = 0
        hit = np.diagonal(counts).astype(float)
        support, predicted = counts.sum(axis=1), counts.sum(axis=0)[:-1]
        predicted[left_out] = 0  # a left-out class has no score; pixels predicted as one stay in `support` as errors
        iou = _ratio(hit, support + predicted - hit)
        f1 = _ratio(2 * hit, support + predicted)
        pixels = float(counts.sum())
        accuracy = float(_ratio(hit.sum(), pixels))
        chance = float(_ratio(support, pixels) @ _ratio(predicted, pixels))
        return {
            "iou": iou,
            "f1": f1,
            "precision": _ratio(hit, predicted),
            "recall": _ratio(hit, support),
            "support": support,
            "miou": _mean(iou),
            "mean_f1": _mean(np.where(hit > 0, f1, np.nan) if protocol == "released" else f1),
            "overall_accuracy": accuracy,
            "kappa": float(_ratio(accuracy - chance, 1 - chance)),
        }


def _bytes(ids: np.ndarray, name: str) -> np.ndarray:
    """`ids` as uint8. Raises `ValueError` where they are not whole numbers from 0 to 255."""
    ids = np.asarray(ids)
    if ids.dtype != np.uint8 and (ids.dtype.kind not in "iub" or not np.array_equal(ids, ids.astype(np.uint8))):
        raise ValueError(f"the {name} must hold whole numbers from 0 to 255, but holds others ({ids.dtype})")
    return ids.astype(np.uint8, copy=False)


def _ratio(numerator: ArrayLike, denominator: ArrayLike) -> np.ndarray:
    """numerator / denominator, NaN where the denominator is 0."""
    numerator, denominator = np.broadcast_arrays(np.asarray(numerator, float), np.asarray(denominator, float))
    undefined = np.full(denominator.shape, np.nan)
    return np.divide(numerator, denominator, out=undefined, where=denominator != 0)


def _mean(values: np.ndarray) -> float:
    """The mean without NaN; NaN where nothing else is left."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")
