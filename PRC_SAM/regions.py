"""Felzenszwalb regions at several scales: a stand-in for SAM's masks where no checkpoint can be had.

The graph-based segmentation of Felzenszwalb and Huttenlocher (2004), from scikit-image, is run from fine to coarse, so
that small and large regions overlap as SAM's masks do. Their scores are made from the image alone: they give an order
and no more, and are not comparable with SAM's.
"""

from itertools import combinations

import numpy as np
from skimage.segmentation import felzenszwalb

from tools.masks import Masks, pack_masks

SMOOTHING = 1.2  # sigma in pixels of the blur before the segmentation; ragged outlines help nobody
DUPLICATE = 0.8  # regions of two scales that overlap by this IoU are one: the better one stays


def felzenszwalb_masks(image: np.ndarray, scales: tuple[float, ...] = (100, 400, 1600), min_area: int = 64) -> Masks:
    """(H,W,3) uint8 -> connected regions of at least `min_area` pixels as `Masks`.

    predicted_iou is the share of colour change at the outline, outside / (outside + inside): the mean difference of
    neighbouring pixels across the outline against that of neighbours within. stability is the best IoU with a region
    of another scale. A region that covers the whole image says nothing and is left out.
    """
    maps = [felzenszwalb(image, scale=scale, sigma=SMOOTHING, min_size=min_area) for scale in scales]
    first = np.cumsum([0, *(regions.max() + 1 for regions in maps)])  # regions are numbered through all scales
    areas = np.concatenate([np.bincount(regions.ravel()) for regions in maps])
    maps = [regions + start for regions, start in zip(maps, first[:-1], strict=True)]
    scores = sum(_outline_contrast(image, regions, first[-1]) for regions in maps)
    stability = np.zeros(first[-1])
    keep = areas < image.shape[0] * image.shape[1]
    for fine, coarse in combinations(range(len(maps)), 2):
        a, b, iou = _overlaps(maps[fine], maps[coarse], areas)
        np.maximum.at(stability, a, iou)
        np.maximum.at(stability, b, iou)
        equal = iou >= DUPLICATE
        keep[np.where(scores[a] >= scores[b], b, a)[equal]] = False
    chosen = np.flatnonzero(keep)
    masks = np.zeros((len(chosen), *image.shape[:2]), bool)
    for index, region in enumerate(chosen):
        masks[index] = maps[np.searchsorted(first, region, side="right") - 1] == region
    return pack_masks(masks, scores[chosen], stability[chosen])


def _outline_contrast(image: np.ndarray, regions: np.ndarray, count: int) -> np.ndarray:
    """(count,) scores 0 to 1 of the regions in this map, 0 for the numbers of other maps."""
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
