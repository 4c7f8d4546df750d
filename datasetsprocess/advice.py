"""Can these labels teach these classes? Warnings of process.py, each with its remedy, before hours of training.

They look at the train split. A classifier learns a class from the difference between patches with the class and patches
without it, and the class activation maps have cells of 16 px. The limits are rules of thumb.
"""

from itertools import combinations

import cv2
import numpy as np

from tools.dataset import Dataset
from tools.labels import IGNORE

MOST_PATCHES = 0.8  # a class in a larger share of the patches is hard to locate
FEWEST_PATCHES = 20  # a class in fewer patches is hard to learn
TOGETHER = 0.9  # two classes: patches with both, as a share of the patches with at least one of them
NARROW = 16  # px: two cells of a feature map of stride 16, at the largest scale of steps 2 and 6, which is 2
FEW_PIXELS = 0.001  # a class with a smaller share of the labelled pixels has next to none
REST = {"unlabeled", "unlabelled", "unknown", "undefined", "unclassified", "background", "void", "none", "nodata"}
REST |= {"no data", "ignore", "other", "others"}
REST_PIXELS = 0.01  # a class of these names with a smaller share of the labelled pixels is no class to learn


def wide_pixels(ids: np.ndarray, num_classes: int) -> np.ndarray:
    """Pixels of each class that lie in regions at least `NARROW` wide: (H,W) uint8 ids -> (K,) int64.

    A pixel counts if some disc of this diameter contains it and lies inside its class (the morphological opening), so
    the width at a pixel is that of the largest such disc: the local thickness of Hildebrand and Rueegsegger (1997),
    here to about a pixel. A region may continue outside the image. Ignored pixels are outside every region.
    """
    radius = NARROW // 2 - 1
    edge = cv2.morphologyEx(ids, cv2.MORPH_GRADIENT, cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3)))
    if not edge.any():
        wide = np.ones(ids.shape, bool)
    else:
        centres = _distance(edge == 0) >= radius
        wide = _distance(~centres) <= radius if centres.any() else centres
    return np.bincount(ids[wide & (ids != IGNORE)], minlength=num_classes)


def _distance(mask: np.ndarray) -> np.ndarray:
    """Of each pixel of a mask to the nearest pixel outside the mask, (H,W) float32."""
    return cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5)


def warnings(dataset: Dataset, labels: dict[str, np.ndarray], pixels: np.ndarray | None) -> list[str]:
    """Sentences on the labels of the train split, each with its remedy; none for good labels.

    `labels` are the image-level labels, id -> (K,) bool; `pixels` (2,K) the pixels of each class, in all and in regions
    at least `NARROW` wide, None where there is no truth.
    """
    present = np.array(list(labels.values()))  # (N,K) bool
    classes, patches = dataset.classes, present.sum(0)
    shares = patches / len(present)
    frequent = [k for k in range(len(classes)) if shares[k] > MOST_PATCHES]
    rare = [f"{name} ({patches[k]})" for k, name in enumerate(classes) if patches[k] < FEWEST_PATCHES]
    together = []
    for a, b in combinations(np.flatnonzero((patches >= FEWEST_PATCHES) & (shares <= MOST_PATCHES)), 2):
        both, either = (present[:, a] & present[:, b]).sum(), (present[:, a] | present[:, b]).sum()
        if both / either > TOGETHER:
            together.append(f"{classes[a]} and {classes[b]} (both in {both} of the {either} patches that have either)")
    remarks = []
    if frequent:
        remarks.append(
            f"in more than {MOST_PATCHES:.0%} of the train patches: "
            f"{', '.join(f'{classes[k]} ({shares[k]:.1%})' for k in frequent)}. A classifier has no reason "
            "to locate a class that nearly every patch shows. Cut smaller patches (patch_size), or use images of a "
            "finer resolution, so that more patches are without the class"
        )
        if rest := [classes[k] for k in frequent if _is_background(dataset, k)]:
            remarks[-1] += (
                f'. For the background, compare --background threshold in step 3 (it needs background = "{rest[0]}" in '
                "[rules] of dataset.toml)"
            )
    if together:
        remarks.append(
            f"nearly always together: {', '.join(together)}. The labels do not tell which pixels belong to which. "
            "Merge the two classes, or cut smaller patches, so that more patches have only one of them"
        )
    if rare:
        remarks.append(
            f"in fewer than {FEWEST_PATCHES} train patches: {', '.join(rare)}. That is too little to learn a class. "
            "Label more patches, let them overlap (stride), merge the class with a similar one, or, if the labels come "
            "from a truth, list its colour in ignore_colours"
        )
    if pixels is not None:
        remarks += _on_pixels(dataset, *pixels)
    return remarks


def _is_background(dataset: Dataset, k: int) -> bool:
    return k == dataset.background or (dataset.background is None and _is_rest(dataset.classes[k]))


def _is_rest(name: str) -> bool:
    return name.lower().replace("_", " ") in REST


def _on_pixels(dataset: Dataset, pixels: np.ndarray, wide: np.ndarray) -> list[str]:
    """Warnings on the truth: pixels of each class (K,), in all and in regions at least `NARROW` wide."""
    narrow = [
        f"{name} ({1 - wide[k] / pixels[k]:.0%})"
        for k, name in enumerate(dataset.classes)
        if pixels[k] and wide[k] < pixels[k] / 2
    ]
    remarks = []
    if narrow:
        remarks.append(
            f"most pixels in regions thinner than {NARROW} px: {', '.join(narrow)}. A cell of the class activation "
            f"maps is {NARROW // 2} px wide at the largest scale, 2, so such regions run into their surroundings. Use "
            "images of a finer resolution, merge the class with a similar wider one, or expect a low IoU"
        )
    for name, colour, share in zip(dataset.classes, dataset.colours.tolist(), pixels / pixels.sum(), strict=True):
        if _is_rest(name) and share < REST_PIXELS:
            remarks.append(
                f"{name} covers {share:.2%} of the pixels, and its name says that it is no class to learn. Remove it "
                f"from classes, write ignore_colours = [{colour}], and cut the scenes again with --overwrite"
            )
    return remarks
