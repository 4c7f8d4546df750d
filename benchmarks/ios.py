"""IOS against the literal loop over classes and masks, and the other refinement rules against IOS: time for one patch.

The masks are Felzenszwalb regions of an image if --image names one, otherwise random ellipses. The label map is a
coarse random map, the class maps are smooth random maps. Mask files are measured too: bytes, writing and reading.

  OMP_NUM_THREADS=1 python benchmarks/ios.py
  OMP_NUM_THREADS=1 python benchmarks/ios.py --image <an aerial image of at least 512 px> --masks 1000
"""

import sys
import tempfile
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import cv2
import numpy as np
from measure import measured
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PRC_SAM.ios import intersection_optimisation
from PRC_SAM.refine import Refinement, Rule
from PRC_SAM.regions import felzenszwalb_masks
from tools.command import check, run
from tools.masks import Masks, load_masks, pack_masks, save_masks


@dataclass(frozen=True)
class Constants:
    size: int = 512  # pixels along each side
    classes: int = 5
    masks: int = 100  # with an image: at most this many, the largest
    tau: float = 0.5
    image: str = ""  # an RGB image of at least `size` pixels whose regions are the masks
    repeats: int = 20


def main(args: Constants) -> None:
    rng = np.random.default_rng(0)
    size, classes = args.size, range(args.classes)
    label = coarse_map(rng, size, args.classes)
    masks = regions(args) if args.image else pack_masks(ellipses(rng, args.masks, size))
    unpacked = masks.unpack()
    print(
        f"{size} px, {args.classes} classes, {len(masks)} masks of {unpacked.mean():.1%} of the patch each, tau "
        f"{args.tau}"
    )
    files(masks)
    loop, loop_seconds, _ = measured(lambda: literal(label, unpacked, classes, args.tau), 1)
    print(f"literal loop   {loop_seconds * 1e3:8.2f} ms")
    maps = {c: cv2.resize(rng.random((32, 32), np.float32), (size, size)) for c in classes}
    seconds = {}
    for rule in get_args(Rule):
        work = partial(Refinement(rule, args.tau, None), label, masks, classes, maps)
        _, seconds[rule], _ = measured(work, args.repeats)
        ratio = seconds[rule] / seconds["ios"]
        print(
            f"{rule:14} {seconds[rule] * 1e3:8.2f} ms, {ratio:4.2f} times IOS, {allocated(work):5.1f} MB beside the "
            "input"
        )
    equal = np.array_equal(intersection_optimisation(label, masks, classes, args.tau), loop)
    print(f"IOS is {loop_seconds / seconds['ios']:.0f} times as fast as the loop, equal to it: {equal}")
    growth(rng, args)


def coarse_map(rng: np.random.Generator, size: int, classes: int) -> np.ndarray:
    """Label map (size,size) uint8 of 8 x 8 squares."""
    side = -(-size // 8)
    squares = rng.integers(0, classes, (8, 8), np.uint8)
    return squares.repeat(side, 0).repeat(side, 1)[:size, :size]


def files(masks: Masks) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "masks.npz"
        _, writing, _ = measured(lambda: save_masks(file, masks), 5)
        _, reading, _ = measured(lambda: load_masks(file, masks.size), 5)
        print(
            f"mask file {file.stat().st_size / 1000:.1f} kB, written in {writing * 1e3:.1f} ms, read in "
            f"{reading * 1e3:.1f} ms"
        )


def allocated(work: Callable) -> float:
    """Peak of the memory that `work` allocates, in MB."""
    tracemalloc.start()
    work()
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return memory / 1e6


def growth(rng: np.random.Generator, args: Constants) -> None:
    """IOS over pixels, classes and masks."""
    for size, classes, count in ((128, 5, 100), (256, 5, 100), (1024, 5, 100), (512, 16, 100), (512, 5, 400)):
        masks = pack_masks(ellipses(rng, count, size))
        work = partial(intersection_optimisation, coarse_map(rng, size, classes), masks, range(classes), args.tau)
        _, seconds, _ = measured(work, 5)
        print(f"growth: {size} px, {classes} classes, {count} masks: {seconds * 1e3:.2f} ms")


def literal(label: np.ndarray, masks: np.ndarray, classes: range, tau: float) -> np.ndarray:
    """The sequential definition: each mask is converted to whole numbers and compared as a whole with each class."""
    result = label.copy()
    for c in classes:
        region = (label == c).astype(np.int64)
        for mask in masks:
            mask = mask.astype(np.int64)
            overlap = np.sum((region + mask) == 2)
            if overlap == 0:
                continue
            r_region, r_mask = overlap / np.sum(region == 1), overlap / np.sum(mask == 1)
            if max(r_region, r_mask) >= tau:
                result[(region if r_region >= r_mask else mask) == 1] = c
    return result


def ellipses(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    y, x = np.mgrid[:size, :size] / size
    masks = []
    for _ in range(count):
        (cx, cy), (a, b) = rng.random(2), rng.uniform(0.02, 0.25, 2)
        masks.append(((x - cx) / a) ** 2 + ((y - cy) / b) ** 2 < 1)
    return np.array(masks)


def regions(args: Constants) -> Masks:
    image = np.array(Image.open(args.image).convert("RGB"))[: args.size, : args.size]
    check(image.shape[:2] == (args.size,) * 2, f"{args.image} is smaller than {args.size} pixels")
    masks = felzenszwalb_masks(np.ascontiguousarray(image), (100, 400, 1600), 64)
    return masks.chosen(np.argsort(-masks.areas)[: args.masks])


if __name__ == "__main__":
    run(main, Constants, __doc__)
