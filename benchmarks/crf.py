"""Dense CRF: modes lattice and exact against the plain way; time, memory, agreement, growth with pixels and classes.

The plain way is NumPy with both N x N kernels in memory, for small sizes. Each line is measured in a process of its
own; its memory is the peak above what the process held before. Ratio: the time divided by the time of the lattice.
Agreement: the share of labels equal to those of mode exact, where it was run.

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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from models.crf import CRF, dense_crf


@dataclass(frozen=True)
class Constants:
    image: Path | None = None  # an 8-bit image; None: blobs with texture and noise
    sizes: tuple[int, ...] = (64, 128, 256, 512, 1024)  # sides of the square images in pixels, with num_classes[0]
    num_classes: tuple[int, ...] = (4, 2, 8, 16)  # the others are measured at classes_size
    classes_size: int = 512  # side of the images for the other numbers of classes
    exact_up_to: int = 128  # largest side for mode exact: its time grows with the 4th power of the side
    plain_up_to: int = 64  # largest side for the plain way: its memory grows with the 4th power of the side
    iterations: int = 10  # of the mean field
    repeats: int = 3  # the fastest of them is reported
    threads: int = 1  # of torch and OpenCV; set OMP_NUM_THREADS for NumPy
    device: str = "cpu"  # of mode exact: cpu | cuda
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


def plain(p: np.ndarray, image: np.ndarray, iterations: int) -> np.ndarray:
    """The plain way, with whole kernels."""
    size = image.shape[0]
    position = np.moveaxis(np.mgrid[:size, :size], 0, -1).reshape(-1, 2).astype(np.float32)
    kernels = []
    for weight, features in ((3, position), (4, np.hstack([position / 67, image.reshape(-1, 3) / np.float32(3)]))):
        kernel = np.exp(-((features[:, None] - features[None]) ** 2).sum(-1) / 2)
        scale = 1 / np.sqrt(kernel.sum(1))
        kernels.append(weight * scale[:, None] * kernel * scale)
    log_p = np.log(np.clip(p, 1e-5, 1)).reshape(len(p), -1)
    q = log_p
    for iteration in range(iterations + 1):
        q = np.exp(log_p + sum(q @ kernel for kernel in kernels) if iteration else log_p)
        q /= q.sum(0)
    return q.reshape(p.shape)


def measure(way: str, size: int, classes: int, args: Constants) -> tuple[float, float, np.ndarray]:
    """Fastest time in seconds, peak memory in MB (of the GPU where one is used), labels (size, size)."""
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(args.threads)
    image, p = load_image(args, size), smooth_maps(np.random.default_rng(args.seed + 1), classes, size)
    if way == "plain":
        q, seconds, memory = measured(lambda: plain(p, image, args.iterations), args.repeats)
    else:
        crf = CRF(crf_iterations=args.iterations, crf_mode="exact" if way == "exact" else "lattice")
        dense_crf(p[:, :8, :8], image[:8, :8], crf, args.device)  # loads libraries: not a part of the cost
        work = partial(dense_crf, p, image, crf, args.device)
        q, seconds, memory = measured(work, args.repeats, args.device)
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
            limits = {"lattice": size, "exact": args.exact_up_to, "plain": args.plain_up_to}
            found = {way: pool.apply(measure, (way, size, classes, args)) for way in limits if size <= limits[way]}
            for way, (seconds, memory, labels) in found.items():
                agreement = f"{(labels == found['exact'][2]).mean():9.2%}" if "exact" in found else ""
                print(
                    f"{size:5} x {size:<4} {classes:7} {way:>7} {seconds:8.3f} {seconds / found['lattice'][0]:7.1f} "
                    f"{seconds / size**2 * 1e6:8.2f} {memory:6.0f} {agreement}",
                    flush=True,
                )


if __name__ == "__main__":
    main(tyro.cli(Constants, description=__doc__))
