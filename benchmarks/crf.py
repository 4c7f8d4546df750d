"""The dense CRF against the plain way: time, memory, agreement, growth with pixels and classes.

The plain way is NumPy with both N x N kernels in memory, for small sizes. Each line is measured in a process of its
own; its memory is the peak above what the process held before. Ratio: the time divided by our time. Agreement: the
share of labels equal to those of the plain way, where it was run.

Command: python benchmarks/crf.py, or with --image FILE for the centre of an image of your own.
"""

import multiprocessing
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
import tyro
from measure import measured
from scipy.special import softmax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from make_pseudo_labels import Constants as Step3
from models.crf import dense_crf

STEP_3 = Step3()  # the constants of the paper


@dataclass(frozen=True)
class Constants:
    image: Path | None = None  # an 8-bit image; None: blobs with texture and noise
    sizes: tuple[int, ...] = (64, 128, 256, 512, 1024)  # sides of the square images in pixels, with num_classes[0]
    num_classes: tuple[int, ...] = (4, 2, 8, 16)  # the others are measured at classes_size
    classes_size: int = 512  # side of the images for the other numbers of classes
    plain_up_to: int = 64  # largest side for the plain way: its memory grows with the 4th power of the side
    repeats: int = 3  # the fastest of them is reported
    threads: int = 1  # of torch and OpenCV; set OMP_NUM_THREADS for NumPy
    seed: int = 0  # of the synthetic image and the class maps


def load_image(args: Constants, size: int) -> np.ndarray:
    """Square image (size, size, 3); (0, 0, 3) where the file is smaller."""
    if args.image is None:
        random = np.random.default_rng(args.seed)
        regions = smooth_maps(random, 6, size, 20).argmax(0)
        texture = cv2.GaussianBlur(random.standard_normal((size, size, 3), np.float32), (0, 0), 1.5)
        return np.clip(random.integers(60, 200, (6, 3))[regions] + 40 * texture, 0, 255).astype(np.uint8)
    image = cv2.imread(str(args.image))
    if image is None:
        sys.exit(f"error: {args.image} is missing or cannot be read: give an 8-bit image with --image")
    top, left = ((side - size) // 2 for side in image.shape[:2])
    return image[top : top + size, left : left + size, ::-1].copy() if min(top, left) >= 0 else image[:0, :0]


def smooth_maps(random: np.random.Generator, classes: int, size: int, sigma: float = 6) -> np.ndarray:
    """Class probabilities (K, size, size) float32 that vary over a few sigma pixels."""
    maps = [cv2.GaussianBlur(random.standard_normal((size, size), np.float32), (0, 0), sigma) for _ in range(classes)]
    maps = np.exp(sigma * np.stack(maps))
    return maps / maps.sum(0)


def ours(p: np.ndarray, image: np.ndarray) -> np.ndarray:
    """The dense CRF with the constants of step 3."""
    return dense_crf(
        p,
        image,
        iterations=STEP_3.crf_iterations,
        gaussian_sigma=STEP_3.gaussian_sigma,
        gaussian_weight=STEP_3.gaussian_weight,
        bilateral_sigma_xy=STEP_3.bilateral_sigma_xy,
        bilateral_sigma_rgb=STEP_3.bilateral_sigma_rgb,
        bilateral_weight=STEP_3.bilateral_weight,
    )


def plain(p: np.ndarray, image: np.ndarray) -> np.ndarray:
    """The plain way, with both N x N kernels in memory."""
    height, width = image.shape[:2]
    position = np.moveaxis(np.mgrid[:height, :width], 0, -1).reshape(-1, 2).astype(np.float32)
    colour = image.reshape(-1, 3).astype(np.float32)
    bilateral = np.hstack([position / STEP_3.bilateral_sigma_xy, colour / STEP_3.bilateral_sigma_rgb])
    gaussian_kernel = STEP_3.gaussian_weight * normalised_kernel(position / STEP_3.gaussian_sigma)
    bilateral_kernel = STEP_3.bilateral_weight * normalised_kernel(bilateral)
    log_p = np.log(np.clip(p, 1e-5, 1)).reshape(len(p), -1)
    q = softmax(log_p, axis=0)
    for _ in range(STEP_3.crf_iterations):
        q = softmax(log_p + q @ gaussian_kernel + q @ bilateral_kernel, axis=0)
    return q.reshape(p.shape)


def normalised_kernel(features: np.ndarray) -> np.ndarray:
    """(N,d) in units of the standard deviation -> (N,N), scaled on both sides by 1 / sqrt(row sums)."""
    kernel = np.exp(-((features[:, None] - features[None]) ** 2).sum(-1) / 2)
    scale = 1 / np.sqrt(kernel.sum(1))
    return scale[:, None] * kernel * scale


def measure(way: str, size: int, classes: int, args: Constants) -> tuple[float, float, np.ndarray]:
    """Fastest time in seconds, peak memory in MB, labels (size, size)."""
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(args.threads)
    image, p = load_image(args, size), smooth_maps(np.random.default_rng(args.seed + 1), classes, size)
    work = plain if way == "plain" else ours
    work(p[:, :8, :8], image[:8, :8])  # loads libraries: not a part of the cost
    q, seconds, memory = measured(partial(work, p, image), args.repeats)
    return seconds, memory, q.argmax(0)


def main(args: Constants) -> None:
    first, *others = args.num_classes
    cases = [(size, first) for size in args.sizes] + [(args.classes_size, classes) for classes in others]
    print("      pixels classes     way  seconds   ratio us/pixel     MB agreement")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for size, classes in cases:
            if load_image(args, size).size == 0:
                print(f"{size:5} x {size:<4} not measured: {args.image} is smaller")
                continue
            ways = ["ours", "plain"] if size <= args.plain_up_to else ["ours"]
            results = {way: pool.apply(measure, (way, size, classes, args)) for way in ways}
            for way, (seconds, memory, labels) in results.items():
                agreement = f"{(labels == results['plain'][2]).mean():9.2%}" if "plain" in results else ""
                print(
                    f"{size:5} x {size:<4} {classes:7} {way:>7} {seconds:8.3f} {seconds / results['ours'][0]:7.1f} "
                    f"{seconds / size**2 * 1e6:8.2f} {memory:6.0f} {agreement}",
                    flush=True,
                )


if __name__ == "__main__":
    main(tyro.cli(Constants, description=__doc__))
