"""Windows that cover a large image: their logits blended, label rows handed on as they are finished."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tools.augment import to_tensor
from tools.labels import IGNORE
from tools.progress import Progress
from tools.rasters import Raster, covering_starts

Predict = Callable[[Tensor], Tensor]  # windows (B,3,P,P) uint8 -> logits (B,K,P,P)


@dataclass(frozen=True)
class Windows:
    """How a scene is covered: windows of `size` pixels a side, one beginning every `stride`, `at_once` in a batch."""

    size: int
    stride: int
    at_once: int


def label_strips(predict: Predict, raster: Raster, num_classes: int, windows: Windows) -> Iterator[np.ndarray]:
    """Class ids of the scene from top to bottom, a strip (h,W) uint8 for each row of windows; nodata is 255.

    Where windows overlap, their logits are summed with weights that fall smoothly to nearly 0 at the border of a
    window, where it sees least of the surroundings. The class of the largest sum wins, so the weights need not add up
    to 1. Sums are kept for one row of windows at a time: K * P * W * 4 bytes. A scene smaller than a window is mirrored
    at its border.
    """
    size, (height, width) = windows.size, raster.shape
    high, wide = max(height, size), max(width, size)
    tops, lefts = covering_starts(high, size, windows.stride), covering_starts(wide, size, windows.stride)
    weight = blending_weight(size)
    total = None
    with Progress(len(tops) * len(lefts), raster.path.name, "window") as bar:
        for top, next_top in zip(tops, [*tops[1:], high], strict=True):
            valid = raster.valid(top, 0, min(size, height), width)
            wanted = [left for left in lefts if valid[:, left : left + size].any()]
            bar.update(len(lefts) - len(wanted))
            for start in range(0, len(wanted), windows.at_once):
                batch = wanted[start : start + windows.at_once]
                logits = predict(torch.stack([_window(raster, top, left, size) for left in batch]))
                if total is None:
                    weight, total = weight.to(logits.device), logits.new_zeros(num_classes, size, wide)
                for left, window in zip(batch, logits, strict=True):
                    total[:, :, left : left + size] += weight * window
                bar.update(len(batch))
            rows = next_top - top  # no later window reaches these
            labels = np.full((rows, wide), IGNORE, np.uint8)
            if total is not None:
                labels = total[:, :rows].argmax(0).to(torch.uint8).cpu().numpy()
                kept = total[:, rows:].clone()
                total.zero_()[:, : size - rows] = kept
            labels = labels[: min(rows, height), :width]
            yield np.where(valid[: len(labels)], labels, IGNORE)


def blending_weight(size: int) -> Tensor:
    """(P,P) float32: squared sines along both sides, highest in the middle, above 0 everywhere."""
    side = torch.sin(torch.pi * (torch.arange(size) + 0.5) / size) ** 2
    return side[:, None] * side


def _window(raster: Raster, top: int, left: int, size: int) -> Tensor:
    """(3,P,P) uint8, mirrored beyond the border of a scene that is smaller."""
    height, width = (min(size, length) for length in raster.shape)
    pixels = raster.read(top, left, height, width)
    if pixels.shape[:2] != (size, size):
        pixels = np.pad(pixels, ((0, size - height), (0, size - width), (0, 0)), mode="reflect")
    return to_tensor(np.array(pixels))
