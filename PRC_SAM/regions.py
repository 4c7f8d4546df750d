"""Felzenszwalb regions at several scales: a stand-in for SAM's masks where no checkpoint is at hand.

The graph-based segmentation of Felzenszwalb and Huttenlocher (2004), from scikit-image, is run from fine to coarse, so
that small and large regions overlap as SAM's masks do. Their scores are computed from the image alone; they order the
regions, but they cannot be compared with SAM's scores.
"""

from itertools import combinations

import numpy as np
from skimage.segmentation import felzenszwalb

from tools.masks import MOST_MASKS, Masks, pack_masks

SMOOTHING = 1.2  # sigma in pixels of the blur before the segmentation, against ragged outlines
DUPLICATE = 0.8  # of two regions of different scales with at least this IoU, only the one of higher score is kept


def felzenszwalb_masks(image: np.ndarray, scales: tuple[float, ...], min_area: int) -> Masks:
    """(H,W,3) uint8 -> connected regions of at least `min_area` pixels as `Masks`.

    predicted_iou is outside / (outside + inside), where outside is the mean colour difference of neighbouring pixels
    across the outline, and inside that of neighbouring pixels within the region. stability is the highest IoU with a
    region of another scale. A region that covers the whole image is left out: it has no outline.
    Raises `ValueError` when there are more regions than a mask file may hold.
    """
    maps = [felzenszwalb(image, scale=scale, sigma=SMOOTHING, min_size=min_area) for scale in scales]
    first = np.cumsum([0, *(regions.max() + 1 for regions in maps)])  # regions are numbered across all scales
    areas = np.concatenate([np.bincount(regions.ravel()) for regions in maps])
    maps = [regions + start for regions, start in zip(maps, first[:-1], strict=True)]
    scores = np.sum([_outline_contrast(image, regions, first[-1]) for regions in maps], axis=0)
    stability = np.zeros(first[-1])
    keep = areas < image.shape[0] * image.shape[1]
    for fine, coarse in combinations(range(len(maps)), 2):
        a, b, iou = _overlaps(maps[fine], maps[coarse], areas)
        np.maximum.at(stability, a, iou)
        np.maximum.at(stability, b, iou)
        equal = iou >= DUPLICATE
        keep[np.where(scores[a] >= scores[b], b, a)[equal]] = False
    chosen = np.flatnonzero(keep)
    if len(chosen) > MOST_MASKS:
        raise ValueError(f"{len(chosen)} regions, more than the {MOST_MASKS} of a mask file: raise min_area or scales")
    masks = np.zeros((len(chosen), *image.shape[:2]), bool)
    for index, region in enumerate(chosen):
        masks[index] = maps[np.searchsorted(first, region, side="right") - 1] == region
    return pack_masks(masks, scores[chosen], stability[chosen])


def _outline_contrast(image: np.ndarray, regions: np.ndarray, count: int) -> np.ndarray:
    """(count,) scores 0 to 1 of the regions in this map; 0 for regions of other maps."""
    colours = image.astype(np.float32)
    sums, pairs = np.zeros((2, count)), np.zeros((2, count))  # [0] neighbours within a region, [1] across its outline
    for axis in (0, 1):
        step = np.sqrt(np.square(np.diff(colours, axis=axis)).sum(-1)).ravel()
        one, other = (np.delete(regions, end, axis).ravel() for end in (-1, 0))
        across = one != other
        for kind, ends in ((0, (one[~across],)), (1, (one[across], other[across]))):
            for end in ends:
                sums[kind] += np.bincount(end, step[across] if kind else step[~across], count)
                pairs[kind] += np.bincount(end, minlength=count)
    inside, outside = sums / np.maximum(pairs, 1) + 1e-6
    return np.where(pairs[1] > 0, outside / (outside + inside), 0)


def _overlaps(one: np.ndarray, other: np.ndarray, areas: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of regions of two maps that share pixels, and their IoU."""
    keys, shared = np.unique(one.ravel() * len(areas) + other.ravel(), return_counts=True)
    a, b = np.divmod(keys, len(areas))
    return a, b, shared / (areas[a] + areas[b] - shared)
