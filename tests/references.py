"""Independent float64 NumPy versions of what several tests compare with."""

import numpy as np


def bilinear(x: np.ndarray, size: tuple[int, int], align_corners: bool) -> np.ndarray:
    """(..., H, W) -> (..., h, w), one axis after the other."""
    for axis, length in ((-2, size[0]), (-1, size[1])):
        before = x.shape[axis]
        if align_corners:
            places = np.linspace(0, before - 1, length) if length > 1 else np.zeros(1)
        else:
            places = np.clip((np.arange(length) + 0.5) * before / length - 0.5, 0, before - 1)
        lower = np.minimum(places.astype(int), before - 1)
        upper = np.minimum(lower + 1, before - 1)
        share = (places - lower).reshape(-1, *([1] * (-1 - axis)))
        x = np.take(x, lower, axis) * (1 - share) + np.take(x, upper, axis) * share
    return x


def largest_error(result: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest expected value."""
    return float(np.abs(result - expected).max() / np.abs(expected).max())
