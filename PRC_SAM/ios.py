"""IOS, the intersection optimisation strategy (method, sections 4 and 7): SAM's regions mend a label map's outlines.

For every class c, ascending, with P = {label == c} of the map as it came, and for every mask S: with I = |P and S|,
where the overlap coefficient I / min(|P|, |S|) reaches tau, the smaller of the two regions takes class c (P when both
are equally large). Later writes win.

All writes of one class carry the same value and P never changes, so the order of the masks cannot matter: per class the
written regions are united, and the unions are laid over each other in the order of the classes. Masks and classes are
packed to one bit a pixel; overlaps are an AND and a population count.
"""

from collections.abc import Iterable
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from tools.command import UserError, check
from tools.dataset import Dataset, load_dataset
from tools.labels import IGNORE, load_label, save_label
from tools.masks import Masks, load_masks
from tools.step import StepFolder

CLASSES_FROM = ("image labels", "prediction")


def intersection_optimisation(
    label: np.ndarray, masks: np.ndarray | Masks, classes: Iterable[int], tau: float
) -> np.ndarray:
    """Refine a label map with masks: (H,W) uint8, (M,H,W) bool or `Masks` -> (H,W) uint8, a new array.

    `classes` are the ids that may be written, in any order; ids without a pixel in the map do nothing. Pixels of 255
    belong to no class, yet a mask that takes a class covers them like any others. The ratios are float64 quotients, as
    is tau: 9 of 10 pixels reach tau = 0.9, and tau = 0 asks for any overlap at all.
    Raises `UserError` for tau outside 0 to 1 and for masks of another size than the map.
    """
    check(0 <= tau <= 1, f"tau is {tau}, but it must lie between 0 and 1")
    label = np.asarray(label)
    classes = sorted({int(c) for c in classes})
    if label.dtype != np.uint8 or label.ndim != 2 or any(not 0 <= c < IGNORE for c in classes):
        raise ValueError(
            f"expected an (H,W) uint8 map and class ids below {IGNORE}, got {label.dtype} of "
            f"{label.shape} and {classes}"
        )
    size = masks.size if isinstance(masks, Masks) else np.shape(masks)[1:]
    check(
        tuple(size) == label.shape,
        f"the label map has {label.shape[0]} x {label.shape[1]} pixels, but the masks "
        f"have {' x '.join(map(str, size))}",
    )
    if isinstance(masks, Masks):
        words = _words(masks.bits)
    else:
        words = _words(np.packbits(np.asarray(masks, bool).reshape(len(masks), label.size), axis=1))
    planes = np.zeros((len(classes), words.shape[1]), np.uint64)
    for plane, c in zip(planes, classes, strict=True):
        plane[:] = _words(np.packbits(label == c)[None])[0]
    painted = np.zeros(label.shape, np.uint8)  # 1 + the class written last, 0 where none was
    for c, union in zip(classes, _written(planes, words, tau), strict=True):
        inside = np.unpackbits(union.view(np.uint8), count=label.size).reshape(label.shape)
        np.maximum(painted, inside * np.uint8(c + 1), out=painted)
    return np.where(painted > 0, painted - np.uint8(1), label)


def _written(planes: np.ndarray, masks: np.ndarray, tau: float) -> np.ndarray:
    """(K,words) class planes, (M,words) masks -> (K,words): the union of all that each class writes."""
    pixels = _counts(planes)
    written = np.zeros_like(planes)
    own = np.zeros(len(planes), bool)  # classes that write their own region
    occupied = masks != 0
    first, last = occupied.argmax(axis=1), masks.shape[1] - occupied[:, ::-1].argmax(axis=1)
    for mask, start, stop in zip(masks, first, last, strict=True):  # an empty mask shares no pixel and writes nothing
        part = mask[start:stop]
        area = int(_counts(part[None])[0])
        overlaps = _counts(planes[:, start:stop] & part)
        reached = overlaps > 0
        reached[reached] = overlaps[reached] / np.minimum(pixels[reached], area) >= tau
        smaller = area < pixels  # r_S > r_P exactly where |S| < |P|
        own |= reached & ~smaller
        for index in np.flatnonzero(reached & smaller):
            written[index, start:stop] |= part
    written[own] |= planes[own]
    return written


def _words(bits: np.ndarray) -> np.ndarray:
    """(N,bytes) uint8 -> (N,words) uint64, zeros appended."""
    rest = -bits.shape[1] % 8
    bits = np.pad(bits, ((0, 0), (0, rest))) if rest else bits
    return np.ascontiguousarray(bits).view(np.uint64)


def _counts(words: np.ndarray) -> np.ndarray:
    return np.bitwise_count(words).sum(axis=1, dtype=np.int64)


def refine_folder(
    step: StepFolder, source: Path, dataset: Dataset, split: str, tau: float, classes_from: str, workers: int = 0
) -> list[str]:
    """IOS over a folder of label maps: <source>/<id>.png and the split's SAM masks -> <step>/<id>.png; the ids done.

    `classes_from` is "image labels" (of the split's image_labels.csv) or "prediction" (the classes in the map itself).
    Files that cannot be read are kept by `step` and reported when it is closed.
    """
    check(0 <= tau <= 1, f"tau is {tau}, but it must lie between 0 and 1")
    check(
        classes_from in CLASSES_FROM,
        f'classes_from is "{classes_from}", but it must be "{CLASSES_FROM[0]}" or "{CLASSES_FROM[1]}"',
    )
    ids, root = step.pending(dataset.ids(split), ".png"), dataset.folder.parents[1]
    if classes_from == "image labels":
        _image_labels(dataset.name, root, split)  # a faulty csv is one error, not one for each image
    work = partial(
        _refine_image,
        source=Path(source),
        target=step.folder,
        name=dataset.name,
        root=root,
        split=split,
        tau=tau,
        classes_from=classes_from,
    )
    step.each(work, ids, workers, "IOS")
    return ids


def _refine_image(
    id: str, source: Path, target: Path, name: str, root: Path, split: str, tau: float, classes_from: str
) -> None:
    dataset = _dataset(name, root)
    label = load_label(source / f"{id}.png", dataset.num_classes)
    file = dataset.sam_masks(split) / f"{id}.npz"
    masks = load_masks(file, f"make it with step 9, python PRC_SAM/get_se_map.py --dataset {name} --split {split}")
    if masks.size != label.shape:
        raise UserError(
            f"{file} holds masks of {masks.size[0]} x {masks.size[1]} pixels, but {source / f'{id}.png'} "
            f"has {label.shape[0]} x {label.shape[1]}: make the masks again, python PRC_SAM/get_se_map.py "
            f"--dataset {name} --split {split} --overwrite"
        )
    if classes_from == "image labels":
        classes = np.flatnonzero(_image_labels(name, root, split)[id])
    else:
        classes = np.setdiff1d(label, [IGNORE])
    save_label(target / f"{id}.png", intersection_optimisation(label, masks, classes, tau), dataset.colours)


@lru_cache(2)
def _dataset(name: str, root: Path) -> Dataset:
    return load_dataset(name, root)


@lru_cache(2)
def _image_labels(name: str, root: Path, split: str) -> dict[str, np.ndarray]:
    """Read once in each worker process, not sent along with every image."""
    return load_dataset(name, root).image_labels(split)
