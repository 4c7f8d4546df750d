"""IOS, the intersection optimisation strategy (method sections 4 and 7).

For every class c, ascending, with P = {label == c} of the original map, and for every SAM mask S: let I = |P and S|,
r_P = I / |P| and r_S = I / |S|. Where I > 0 and max(r_P, r_S) >= tau, the smaller of the two regions takes class c:
P where r_P >= r_S (which takes back what a lower class has written in P), else S. Later writes win: the higher class.

All writes of one class have the same value and P never changes, so the order of the masks cannot change the result.
"""

from collections.abc import Iterable

import numpy as np

from tools.command import check
from tools.masks import Masks


def intersection_optimisation(label: np.ndarray, masks: Masks, classes: Iterable[int], tau: float) -> np.ndarray:
    """Refine a label map (H,W) uint8 with masks -> (H,W) uint8, a new array.

    `classes` are the ids that may be written, in any order; ids without a pixel in the map have no effect. Pixels of
    255 belong to no class, but a mask that takes a class covers them too. The ratios and tau are float64: 9 of 10
    pixels reach tau = 0.9. tau = 0 accepts any overlap of at least one pixel.
    Raises `UserError` for tau outside 0 to 1 and for masks of another size than the map.
    """
    check(0 <= tau <= 1, f"tau is {tau}, but it must lie between 0 and 1")
    refined = label.copy()
    for c in sorted(classes):
        region = label == c
        overlaps = overlaps_with(masks, region)
        r_region = overlaps / max(np.count_nonzero(region), 1)  # an empty region or mask has no overlap, so ratio 0
        r_mask = overlaps / np.maximum(masks.areas, 1)
        reached = (overlaps > 0) & (np.maximum(r_region, r_mask) >= tau)
        region_is_smaller = r_region >= r_mask
        if (reached & region_is_smaller).any():
            refined[region] = c
        written = np.bitwise_or.reduce(masks.bits[reached & ~region_is_smaller], axis=0)
        refined[np.unpackbits(written, count=label.size).view(bool).reshape(label.shape)] = c
    return refined


def overlaps_with(masks: Masks, region: np.ndarray) -> np.ndarray:
    """Pixels that a region (H,W) bool shares with each mask -> (M,) int64. Raises `UserError` for another size."""
    check_size(masks, region.shape)
    shared = _words(masks.bits) & _words(np.packbits(region)[None])
    return np.bitwise_count(shared).sum(axis=1, dtype=np.int64)


def check_size(masks: Masks, size: tuple[int, ...]) -> None:
    """Raise `UserError` unless the masks have the size (H, W) of the label map."""
    check(
        masks.size == size,
        f"the label map has {size[0]} x {size[1]} pixels, but the masks have {masks.size[0]} x {masks.size[1]}",
    )


def _words(bits: np.ndarray) -> np.ndarray:
    """(N,bytes) uint8 -> (N,words) uint64, zeros appended: 64 pixels are combined and counted at once."""
    missing = -bits.shape[1] % 8
    if missing:
        bits = np.pad(bits, ((0, 0), (0, missing)))
    return bits.view(np.uint64)
