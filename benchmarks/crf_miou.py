"""What the CRF's lattice costs in mIoU against whole kernels (the plain way of crf.py), on images with truth.

Maps like CAMs are made from the truth: the mask of each class, blurred to the resolution of a feature map (16 px),
times a random gain, plus smooth noise, divided by its maximum as stored maps are. Agreement: the share of equal labels.
Without a folder the images are synthetic.

Command: OMP_NUM_THREADS=1 python benchmarks/crf_miou.py, or with --split datasets/NAME/train for real patches
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
import tyro
from crf import ours, plain
from measure import aerial_patch, measured

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.labels import load_image, load_label
from tools.scores import ConfusionMatrix


@dataclass(frozen=True)
class Constants:
    split: Path | None = None  # a folder with images/ and labels/ of a data set; None: synthetic images
    sizes: tuple[int, ...] = (64,)  # pixels; crops at the centre; the plain way needs 0.5 GB at 64, 8 GB at 128
    counts: tuple[int, ...] = (16,)  # images of each size
    num_classes: int = 16  # of the split
    blur: float = 16.0  # pixels, sigma
    noise: float = 0.4  # standard deviation; the maximum of a map is about 1
    seed: int = 0


def patches(args: Constants, size: int, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield images (S,S,3) and their truth (S,S), which holds at least two classes."""
    random = np.random.default_rng(args.seed)
    if args.split is None:
        for _ in range(count):
            yield aerial_patch(random, size, 5, coarse=4)
        return
    files = sorted((args.split / "images").glob("*.png"))
    yielded = 0
    for index in random.permutation(len(files)):
        image = load_image(files[index])
        truth = load_label(args.split / "labels" / files[index].name, args.num_classes)
        top, left = (max(0, side - size) // 2 for side in truth.shape)
        cut = slice(top, top + size), slice(left, left + size)
        if yielded < count and truth[cut].shape == (size, size) and len(np.unique(truth[cut])) > 1:
            yielded += 1
            yield np.ascontiguousarray(image[cut]), truth[cut]


def cam_like(truth: np.ndarray, random: np.random.Generator, args: Constants) -> tuple[np.ndarray, np.ndarray]:
    """Class ids (k,), maps (k,S,S) in 0..1."""
    classes = np.unique(truth[truth != 255])
    maps = []
    for k in classes:
        mask = cv2.GaussianBlur((truth == k).astype(np.float32), (0, 0), args.blur)
        noise = cv2.GaussianBlur(random.standard_normal(truth.shape, np.float32), (0, 0), args.blur)
        noise *= args.noise / noise.std()
        value = np.maximum(random.uniform(0.6, 1.4) * mask / mask.max() + noise, 0)
        maps.append(value / (value.max() + 1e-5))
    return classes, np.stack(maps)


def main(args: Constants) -> None:
    cv2.setNumThreads(1)
    for size, count in zip(args.sizes, args.counts, strict=True):
        random = np.random.default_rng(args.seed)
        ways = {"lattice": ours, "plain": plain}
        matrices = {name: ConfusionMatrix(args.num_classes) for name in ("maps", *ways)}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        equal: list[float] = []
        for image, truth in patches(args, size, count):
            classes, maps = cam_like(truth, random, args)
            labels = {"maps": maps.argmax(0)}
            for name, way in ways.items():
                q, duration, _ = measured(partial(way, maps, image))
                labels[name] = q.argmax(0)
                seconds[name].append(duration)
            for name, indices in labels.items():
                matrices[name].update(truth, classes[indices].astype(np.uint8))
            equal.append(float(np.mean(labels["lattice"] == labels["plain"])))
        miou = {name: 100 * matrix.scores()["miou"] for name, matrix in matrices.items()}
        print(
            f"{len(equal)} of {size} x {size}: mIoU of the maps {miou['maps']:.2f}, lattice {miou['lattice']:.2f}, "
            f"plain {miou['plain']:.2f}, difference {miou['lattice'] - miou['plain']:+.2f}; equal labels "
            f"{np.mean(equal):.2%}; lattice {np.median(seconds['lattice']):.3f} s, plain "
            f"{np.median(seconds['plain']):.3f} s an image",
            flush=True,
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(tyro.cli(Constants, description=__doc__))
