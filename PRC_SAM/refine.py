"""Rules that refine a label map with the masks of step 9: the paper's IOS and three rules to compare it with.

ios       the paper's, PRC_SAM/ios.py
sepl      each mask of which more than half lies in the region of one foreground class takes that class. No threshold to
          tune. After Chen et al., "Segment Anything Model (SAM) Enhanced Pseudo Labels for Weakly Supervised Semantic
          Segmentation", 2023, in this reading: the masks are added to the map, pixels outside them keep their class,
          and the paper's second criterion (masks that hold most of a class's region) is left out
vote      each mask takes the class that is most frequent in it
mean_cam  each mask takes the class whose class map (CAM, or probability of the segmenter) has the highest mean in it

In sepl, vote and mean_cam small masks lie on top of large ones. Ties go to the lower class id: between classes for one
mask, and between masks of one size for one pixel. A mask without evidence for any class changes nothing.
"""

import numpy as np

from PRC_SAM.ios import Words, laid_over, packed
from tools.masks import Masks

STEPS = np.float32(1 << 24)  # class maps are summed as whole multiples of 1/STEPS: exactly, so that equal means are equal


def sepl(label: np.ndarray, masks: Masks, foreground: list[int]) -> np.ndarray:
    ids, planes, words = packed(label, masks, foreground)
    shared = words.overlaps(planes)
    return _small_on_top(label, ids, words, np.where(2 * shared > words.areas(), shared, 0))


def vote(label: np.ndarray, masks: Masks, classes: list[int]) -> np.ndarray:
    ids, planes, words = packed(label, masks, classes)
    return _small_on_top(label, ids, words, words.overlaps(planes))


def mean_cam(label: np.ndarray, masks: Masks, maps: dict[int, np.ndarray]) -> np.ndarray:
    ids, _, words = packed(label, masks, maps)
    return _small_on_top(label, ids, words, words.sums(_sums_of_words(words, [maps[c] for c in ids])))


def _sums_of_words(words: Words, maps: list[np.ndarray]) -> np.ndarray:
    """(K,n) int32: the sum of each map (H,W) over the pixels of each word, in 1/STEPS.

    A run of pixels adds the difference of two values of the map's cumulative sum. The cumulative sum may overflow int32;
    the difference over at most 64 pixels is still exact, because int32 wraps around.
    """
    cumulative = np.zeros((len(maps), maps[0].size + 1), np.int32)
    for row, one in zip(cumulative, maps, strict=True):
        np.cumsum(np.rint(one.ravel() * STEPS).astype(np.int32), out=row[1:])
    pixels = words.values.view(">u8").astype(np.uint64)  # the first pixel in the highest bit
    one = np.uint64(1)
    first, last = pixels & ~(pixels >> one), pixels & ~(pixels << one)  # pixels where a run begins, and where it ends
    sums, where = np.zeros((len(maps), len(pixels)), np.int32), np.arange(len(pixels))
    while len(where):  # the last run of each word that has one left
        place = 64 * words.places[where]
        begin, end = place + 63 - _trailing_zeros(first), place + 64 - _trailing_zeros(last)
        sums[:, where] += cumulative[:, end] - cumulative[:, begin]
        first, last = first & (first - one), last & (last - one)
        left = np.flatnonzero(first)
        where, first, last = where[left], first[left], last[left]
    return sums


def _trailing_zeros(numbers: np.ndarray) -> np.ndarray:
    return np.bitwise_count((numbers & -numbers) - np.uint64(1)).astype(np.int64)


def _small_on_top(label: np.ndarray, ids: list[int], words: Words, evidence: np.ndarray) -> np.ndarray:
    """Each mask takes the class of the most evidence (K,M), none where it's all 0; small masks lie on top of large."""
    length = -(-label.size // 64)
    written = np.zeros((len(ids), length), np.uint64)
    free = ~np.zeros(length, np.uint64)  # pixels that no smaller mask covers
    taken = evidence.argmax(axis=0) if ids else np.zeros(0)
    for mask in np.lexsort((taken, words.areas())):
        if evidence[taken[mask], mask] > 0:
            values, places = words.of(mask)
            values = values & free[places]
            written[taken[mask], places] |= values
            free[places] ^= values
    return laid_over(label, ids, written)
