"""Rules that refine label maps with the masks of step 9: the paper's IOS, and three rules to compare IOS with.

ios       the paper's rule, PRC_SAM/ios.py
sepl      a mask takes a foreground class when more than half of the mask lies in the region of that class. There is no
          threshold to tune. After Chen et al., "Segment Anything Model (SAM) Enhanced Pseudo Labels for Weakly
          Supervised Semantic Segmentation", 2023, read as follows: masks are added to the map and pixels outside them
          keep their class, and their second criterion (a mask that holds most of a class's region) is left out.
          Foreground is every class but the data set's background class, and every class where there is none
vote      a mask takes the class that is most frequent in the mask
mean_cam  a mask takes the class whose map (the CAM, or the segmenter's probability) has the highest mean in the mask

With sepl, vote and mean_cam small masks lie on top of large masks. Ties go to the lower class id: between classes for a
mask, and between masks of equal size for a pixel. A mask without evidence for any class changes nothing. Only classes
that the caller names are written.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from PRC_SAM.ios import check_size, intersection_optimisation, overlaps_with
from tools.masks import Masks

Rule = Literal["ios", "sepl", "vote", "mean_cam"]


@dataclass(frozen=True)
class Refinement:
    """A rule and its settings; calling it refines one label map."""

    rule: Rule
    tau: float  # of ios
    background: int | None  # the class that is no foreground for sepl

    def __call__(
        self,
        label: np.ndarray,
        masks: Masks,
        classes: Iterable[int],
        maps: Mapping[int, np.ndarray] | None = None,
    ) -> np.ndarray:
        """Label map (H,W) uint8, masks, the class ids that may be written -> refined (H,W) uint8, a new array.

        `maps`: class id -> map (H,W) float32 in 0..1, for mean_cam alone, which writes no class without a map. Pixels
        of 255 belong to no class, but a mask that takes a class covers them too.
        Raises `UserError` for tau outside 0 to 1 and for masks of another size than the label map.
        """
        ids = sorted(classes)
        if self.rule == "ios":
            return intersection_optimisation(label, masks, ids, self.tau)
        if self.rule == "sepl":
            return sepl(label, masks, [c for c in ids if c != self.background])
        if self.rule == "vote":
            return vote(label, masks, ids)
        class_maps = maps or {}
        return mean_cam(label, masks, {c: class_maps[c] for c in ids if c in class_maps})


def sepl(label: np.ndarray, masks: Masks, classes: Sequence[int]) -> np.ndarray:
    """A mask takes the class, of `classes` (ascending), that holds more than half of its pixels."""
    overlaps = _overlaps(label, masks, classes)
    return _small_on_top(label, masks, classes, np.where(2 * overlaps > masks.areas, overlaps, 0))


def vote(label: np.ndarray, masks: Masks, classes: Sequence[int]) -> np.ndarray:
    """A mask takes the class, of `classes` (ascending), that holds most of its pixels."""
    return _small_on_top(label, masks, classes, _overlaps(label, masks, classes))


def mean_cam(label: np.ndarray, masks: Masks, maps: Mapping[int, np.ndarray]) -> np.ndarray:
    """A mask takes the class, of those in `maps` (ascending), whose map has the highest mean in the mask."""
    check_size(masks, label.shape)
    float32 = np.array(list(maps.values()), np.float32).reshape(len(maps), *label.shape)
    # Multiples of 2^-23: float64 sums them without rounding, so that equal means are equal in any order of the pixels.
    values = (float32 + np.float32(1)).astype(np.float64) - 1
    sums = np.zeros((len(maps), len(masks)))  # within a mask, the highest sum is the highest mean
    for m in range(len(masks)):
        box, inside = _pixels(masks, m)
        sums[:, m] = np.einsum("khw,hw->k", values[:, *box], inside)
    return _small_on_top(label, masks, list(maps), sums)


def _overlaps(label: np.ndarray, masks: Masks, classes: Sequence[int]) -> np.ndarray:
    """(K,M) int64: the pixels of each class in each mask."""
    overlaps = [overlaps_with(masks, label == c) for c in classes]
    return np.array(overlaps, np.int64).reshape(len(classes), len(masks))


def _small_on_top(label: np.ndarray, masks: Masks, classes: Sequence[int], evidence: np.ndarray) -> np.ndarray:
    """Each mask takes the class of the most evidence (K,M), none where all is 0; small masks lie on large masks."""
    refined = label.copy()
    if not classes:
        return refined
    strongest = evidence.argmax(axis=0)  # on a tie the lower class
    from_small_to_large = np.lexsort((strongest, masks.areas))  # of equally large ones the lower class first
    for m in reversed(from_small_to_large):
        if evidence[strongest[m], m] > 0:
            box, inside = _pixels(masks, m)
            refined[box][inside] = classes[strongest[m]]
    return refined


def _pixels(masks: Masks, m: int) -> tuple[tuple[slice, slice], np.ndarray]:
    """Where the box of mask m lies in the image, and the mask in that box (h,w) bool."""
    height, width = masks.size
    x0, y0, x1, y1 = masks.boxes[m]
    box = slice(y0, y1 + 1), slice(x0, x1 + 1)
    mask = np.unpackbits(masks.bits[m], count=height * width).view(bool).reshape(height, width)
    return box, mask[box]
