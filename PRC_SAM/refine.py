"""Rules that refine label maps with the masks of step 9: the paper's IOS, and three rules to compare IOS with.

ios       the paper's rule, PRC_SAM/ios.py
sepl      a mask takes a foreground class when more than half of the mask lies in the region of that class. There is no
          threshold to tune. After Chen et al., "Segment Anything Model (SAM) Enhanced Pseudo Labels for Weakly
          Supervised Semantic Segmentation", 2023, read as follows: masks are added to the map and pixels outside them
          keep their class, and the paper's second criterion (a mask that holds most of a class's region) is left out.
          Foreground is every class but the data set's background class, and every class where there is none
vote      a mask takes the class that is most frequent in the mask
mean_cam  a mask takes the class whose map (the CAM, or the segmenter's probability) has the highest mean in the mask

With sepl, vote and mean_cam small masks lie on top of large masks. Ties go to the lower class id: between classes for a
mask, and between masks of equal size for a pixel. A mask without evidence for any class changes nothing. Only classes
that the caller names are written.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from PRC_SAM.ios import Words, intersection_optimisation, laid_over, packed
from tools.dataset import Dataset
from tools.labels import IGNORE, load_label, save_label
from tools.masks import Masks, load_masks
from tools.step import Step
from tools.steps import STEPS

Rule = Literal["ios", "sepl", "vote", "mean_cam"]


@dataclass(frozen=True)
class Refinement:
    """A rule and its settings; calling it refines one label map."""

    rule: Rule = "ios"
    tau: float = 0.9  # of ios
    background: int | None = None  # the class that is no foreground for sepl

    def __call__(
        self,
        label: np.ndarray,
        masks: np.ndarray | Masks,
        classes: Iterable[int],
        maps: Mapping[int, np.ndarray] | None = None,
    ) -> np.ndarray:
        """Label map (H,W) uint8, M masks, the class ids that may be written -> refined (H,W) uint8, a new array.

        `maps`: class id -> map (H,W) float32 in 0..1, for mean_cam alone, which writes no class without a map. Pixels
        of 255 belong to no class, but a mask that takes a class covers them too.
        Raises `UserError` for tau outside 0 to 1 and for masks of another size than the label map.
        """
        maps = maps or {}
        if self.rule == "ios":
            return intersection_optimisation(label, masks, classes, self.tau)
        if self.rule == "sepl":
            classes = [c for c in classes if c != self.background]
        if self.rule == "mean_cam":
            classes = [c for c in classes if c in maps]
        ids, planes, words = packed(label, masks, classes)
        if not ids:
            return label.copy()
        evidence = _sums(words, [maps[c] for c in ids]) if self.rule == "mean_cam" else words.overlaps(planes)
        if self.rule == "sepl":
            evidence = np.where(2 * evidence > words.areas, evidence, 0)
        return _small_on_top(label, ids, words, evidence)


def refine_folder(
    step: Step,
    source: str,
    refinement: Refinement,
    classes: Mapping[str, np.ndarray] | None = None,
    maps: str = "cams",
) -> None:
    """Refine <source>/<id>.png of all patches that `step`, a step that is open, has not made yet.

    `source` and `maps` are names of folders that the step reads; `maps` holds the class maps of rule mean_cam: the CAMs
    of step 2, or the probabilities that step 6 writes beside its label maps (`source` itself). `classes`: id -> (K,)
    bool, the image-level labels; without them the classes of a patch are those in its label map. Files that cannot be
    read are reported at the end of the step.
    """
    work = partial(
        refine_patch,
        source=step.sources[source],
        masks=step.sources["sam_masks"],
        maps=step.sources[maps] if refinement.rule == "mean_cam" else None,
        output=step.path,
        dataset=step.dataset,
        refinement=refinement,
        maker=STEPS["sam_masks"].hint(step.args, split=step.split),
    )
    pending = step.pending(step.ids, ".png")
    # the classes of a patch go with its id: all labels would be sent to the workers with every patch
    items = [(id, None if classes is None else np.flatnonzero(classes[id])) for id in pending]
    step.each(work, items, step.info.title)


def refine_patch(
    item: tuple[str, np.ndarray | None],
    *,
    source: Path,
    masks: Path,
    maps: Path | None,
    output: Path,
    dataset: Dataset,
    refinement: Refinement,
    maker: str,
) -> None:
    """Refine one patch, (id, class ids or None), from files to a file; `maker` is the command that makes the masks.

    `maps` holds CAMs, or is `source` itself and holds probabilities, which are not divided by their maximum.
    Raises `UserError` that names the file when a file is missing, damaged or of another size.
    """
    id, classes = item
    label = load_label(source / f"{id}.png", dataset.num_classes)
    found = load_masks(masks / f"{id}.npz", label.shape, maker)
    if classes is None:
        classes = np.setdiff1d(label, [IGNORE])
    class_maps = None
    if maps:
        from tools.cams import load_cams  # imports torch, which takes seconds and no other rule needs

        values = load_cams(maps / f"{id}.npz", dataset.num_classes, label.shape, relative=maps != source)
        class_maps = dict(zip(*values, strict=True))
    save_label(output / f"{id}.png", refinement(label, found, classes, class_maps), dataset.colours)


def _sums(words: Words, maps: list[np.ndarray]) -> np.ndarray:
    """(K,M) float64: the sum of each map (H,W) over each mask, exact for maps rounded to multiples of 2^-23."""
    mask, begin, end = _runs(words)
    sums = np.zeros((len(maps), len(words.areas)))
    for row, values in zip(sums, maps, strict=True):
        # one more in each pixel rounds small values to the same multiples, so that float64 sums without rounding
        total = cv2.integral(values.reshape(1, -1) + np.float32(1), sdepth=cv2.CV_64F)[1]  # cumulative sum
        row[:] = np.bincount(mask, total.take(end) - total.take(begin), len(row)) - words.areas
    return sums


def _runs(words: Words) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs of pixels, each within one word: its mask, its first pixel, and the pixel after its last."""
    pixels = words.values.view(">u8").astype(np.uint64)  # the first pixel in the highest bit
    one = np.uint64(1)
    first, last = pixels & ~(pixels >> one), pixels & ~(pixels << one)  # the first and the last pixel of each run
    mask = np.repeat(np.arange(len(words.areas)), np.diff(words.starts))
    place = 64 * words.places
    runs = [(mask[:0], place[:0], place[:0])]
    while len(mask):  # in each round the last run of every word that has a run left
        runs.append((mask, place + 63 - _trailing_zeros(first), place + 64 - _trailing_zeros(last)))
        first, last = first & (first - one), last & (last - one)
        left = np.flatnonzero(first)
        mask, place, first, last = mask[left], place[left], first[left], last[left]
    masks, begins, ends = (np.concatenate(part) for part in zip(*runs, strict=True))
    return masks, begins, ends


def _trailing_zeros(numbers: np.ndarray) -> np.ndarray:
    return np.bitwise_count((numbers & -numbers) - np.uint64(1)).astype(np.int64)


def _small_on_top(label: np.ndarray, ids: list[int], words: Words, evidence: np.ndarray) -> np.ndarray:
    """Each mask takes the class of the most evidence (K,M), or none where all is 0; small masks lie on large masks."""
    length = -(-label.size // 64)
    written = np.zeros((len(ids), length), np.uint64)
    free = ~np.zeros(length, np.uint64)  # pixels that no smaller mask has taken
    taken = evidence.argmax(axis=0)
    for mask in np.lexsort((taken, words.areas)):
        if evidence[taken[mask], mask] > 0:
            values, places = words.of(mask)
            values = values & free[places]
            written[taken[mask], places] |= values
            free[places] ^= values
    return laid_over(label, ids, written)
