"""IOS side by side with the literal loop over classes and masks: time for one patch, memory and agreement.

The masks are Felzenszwalb regions of a real image when one is named, else random ellipses; the label map is a coarse
random one. Reading the mask file is timed apart.

  OMP_NUM_THREADS=1 python benchmarks/ios.py
  OMP_NUM_THREADS=1 python benchmarks/ios.py --image <a 512 px aerial tile>
"""

import sys
import tempfile
import tracemalloc
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from measure import measured

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PRC_SAM.ios import intersection_optimisation
from PRC_SAM.regions import felzenszwalb_masks
from tools.command import check, run
from tools.labels import load_image
from tools.masks import load_masks, pack_masks, save_masks


@dataclass(frozen=True)
class Constants:
    size: int = 512  # pixels along each side
    classes: int = 5
    masks: int = 100
    tau: float = 0.5
    image: str = ""  # an RGB image of at least `size` pixels whose regions are the masks
    repeats: int = 20


def main(constants: Constants) -> None:
    rng = np.random.default_rng(0)
    size = constants.size
    blocks = np.kron(rng.integers(0, constants.classes, (8, 8)), np.ones((-(-size // 8),) * 2))
    label = blocks[:size, :size].astype(np.uint8)
    dense = regions(constants) if constants.image else ellipses(rng, constants.masks, size)
    print(
        f"{size} px, {constants.classes} classes, {len(dense)} masks of {dense.mean():.1%} of the patch each, tau "
        f"{constants.tau}"
    )
    classes = range(constants.classes)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "masks.npz"
        save_masks(file, pack_masks(dense))
        reading = measured(lambda: load_masks(file).bits, 5)[1]
        print(f"mask file {file.stat().st_size / 1000:.1f} kB, read in {reading * 1e3:.2f} ms")
        packed = load_masks(file)
        packed.bits  # noqa: B018 (reads them)
    expected = literal(label, dense, classes, constants.tau)
    seconds = {}
    for name, work, repeats in (
        ("literal loop", lambda: literal(label, dense, classes, constants.tau), 2),
        ("masks as bool", lambda: intersection_optimisation(label, dense, classes, constants.tau), constants.repeats),
        ("masks as bits", lambda: intersection_optimisation(label, packed, classes, constants.tau), constants.repeats),
    ):
        seconds[name] = measured(work, repeats)[1]
        tracemalloc.start()
        result = work()
        memory = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        print(
            f"{name}  {seconds[name] * 1e3:8.2f} ms, ratio {seconds['literal loop'] / seconds[name]:6.1f}, "
            f"{memory / 1e6:6.1f} MB beside the input, equal to the loop: {np.array_equal(result, expected)}"
        )
    growth(rng, constants)


def growth(rng: np.random.Generator, constants: Constants) -> None:
    """Masks as bits over pixels, classes and masks."""
    for size, classes, count in ((256, 5, 100), (512, 5, 100), (1024, 5, 100), (512, 16, 100), (512, 5, 400)):
        label = np.kron(rng.integers(0, classes, (8, 8)), np.ones((size // 8,) * 2)).astype(np.uint8)
        packed = pack_masks(ellipses(rng, count, size))
        work = partial(intersection_optimisation, label, packed, range(classes), constants.tau)
        print(f"growth: {size} px, {classes} classes, {count} masks: {measured(work, 5)[1] * 1e3:.2f} ms")


def literal(label: np.ndarray, masks: np.ndarray, classes: range, tau: float) -> np.ndarray:
    """The sequential definition, every mask converted to whole numbers and compared as a whole for each pair."""
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


def regions(constants: Constants) -> np.ndarray:
    image = load_image(Path(constants.image))[: constants.size, : constants.size]
    check(image.shape[:2] == (constants.size,) * 2, f"{constants.image} is smaller than {constants.size} pixels")
    masks = felzenszwalb_masks(np.ascontiguousarray(image))
    return masks.chosen(np.argsort(-masks.areas)[: constants.masks]).unpack()


if __name__ == "__main__":
    run(main, Constants, __doc__)
