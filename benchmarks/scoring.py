"""The confusion matrix against plain ways: time, memory, agreement, growth with pixels and classes.

Plain ways: a loop over all pairs of classes; numpy.bincount of K * truth + prediction in 64 bits (the usual fast_hist);
scikit-learn's confusion_matrix where it is installed. The last line measures patches in PNG files, decoding included.

Command: OMP_NUM_THREADS=1 python benchmarks/scoring.py
"""

import sys
import tempfile
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tyro
from measure import measured

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.labels import load_label, save_label
from tools.scores import ConfusionMatrix


@dataclass(frozen=True)
class Constants:
    side: int = 6000  # pixels: truth and prediction are square
    num_classes: int = 16
    repeats: int = 3  # the fastest of them is reported
    files: int = 40  # patches of 512 x 512 in PNG files
    seed: int = 0  # of the synthetic label maps


def label_maps(side: int, num_classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Truth and prediction (side, side) uint8: blobs, 2 % ignored; a fifth of the prediction is wrong."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, num_classes, (side // 20 + 1, side // 20 + 1)).astype(np.uint8)
    truth = cv2.resize(coarse, (side, side), interpolation=cv2.INTER_NEAREST)
    wrong = random.random((side, side), np.float32) < 0.2
    prediction = np.where(wrong, random.integers(0, num_classes, (side, side), np.uint8), truth)
    truth[random.random((side, side), np.float32) < 0.02] = 255
    return truth, prediction


def ours(truth: np.ndarray, prediction: np.ndarray, num_classes: int) -> np.ndarray:
    matrix = ConfusionMatrix(num_classes)
    matrix.update(truth, prediction)
    return matrix.counts[:, :num_classes]


def loop_over_pairs(truth: np.ndarray, prediction: np.ndarray, num_classes: int) -> np.ndarray:
    counts = np.zeros((num_classes, num_classes), np.int64)
    for row, column in np.ndindex(counts.shape):
        counts[row, column] = np.count_nonzero((truth == row) & (prediction == column))
    return counts


def fast_hist(truth: np.ndarray, prediction: np.ndarray, num_classes: int) -> np.ndarray:
    kept = truth != 255
    pairs = num_classes * truth[kept].astype(int) + prediction[kept]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def scikit_learn(truth: np.ndarray, prediction: np.ndarray, num_classes: int) -> np.ndarray:
    from sklearn.metrics import confusion_matrix

    kept = truth != 255
    return confusion_matrix(truth[kept], prediction[kept], labels=np.arange(num_classes))


def measure(way: Callable, repeats: int, *arguments: Any) -> tuple[float, float, np.ndarray]:
    """Fastest time in seconds, memory in MB beside the arguments, counts."""
    counts, seconds, _ = measured(partial(way, *arguments), repeats)
    tracemalloc.start()
    way(*arguments)
    memory = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    return seconds, memory, counts


def compare(args: Constants) -> None:
    truth, prediction = label_maps(args.side, args.num_classes, args.seed)
    fastest, memory, reference = measure(ours, args.repeats, truth, prediction, args.num_classes)
    print(
        f"ours: {truth.size / 1e6:.0f} Mpx of {args.num_classes} classes in {fastest:.3f} s, {memory:.0f} MB",
        flush=True,
    )
    for way, repeats in ((fast_hist, args.repeats), (loop_over_pairs, 1), (scikit_learn, 1)):
        try:
            seconds, memory, counts = measure(way, repeats, truth, prediction, args.num_classes)
        except ImportError:
            print(f"{way.__name__}: not installed")
            continue
        print(
            f"{way.__name__}: {seconds:.3f} s, {seconds / fastest:.1f} times ours, {memory:.0f} MB, counts "
            f"{'equal' if np.array_equal(counts, reference) else 'DIFFERENT'}",
            flush=True,
        )


def growth(args: Constants) -> None:
    for side, num_classes in (
        (args.side // 4, 16),
        (args.side // 2, 16),
        (args.side, 2),
        (args.side, 6),
        (args.side, 64),
    ):
        seconds, _, _ = measure(ours, args.repeats, *label_maps(side, num_classes, args.seed), num_classes)
        print(
            f"ours: {side**2 / 1e6:.2f} Mpx of {num_classes} classes in {1e3 * seconds:.1f} ms, "
            f"{1e9 * seconds / side**2:.2f} ns a pixel"
        )


def from_files(args: Constants) -> None:
    random, colours = np.random.default_rng(args.seed), np.arange(48, dtype=np.uint8).reshape(16, 3)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.files):
            coarse = random.integers(0, 16, (12, 12)).astype(np.uint8)
            save_label(
                Path(folder) / f"{number}.png", cv2.resize(coarse, (512, 512), interpolation=cv2.INTER_NEAREST), colours
            )
        files = sorted(Path(folder).iterdir())
        labels, decoding, _ = measured(lambda: [load_label(file, 16) for file in files])
        matrix = ConfusionMatrix(16)

        def score() -> None:
            for label in labels:
                matrix.update(label, label)

        _, scoring, _ = measured(score)
    print(
        f"patches of 512 x 512: decoding and checking a label map {1e3 * decoding / len(files):.2f} ms, scoring "
        f"{1e3 * scoring / len(files):.2f} ms"
    )


def main(args: Constants) -> None:
    cv2.setNumThreads(1)
    compare(args)
    growth(args)
    from_files(args)


if __name__ == "__main__":
    main(tyro.cli(Constants, description=__doc__))
