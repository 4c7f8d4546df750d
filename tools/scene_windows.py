"""Windows that cover a large image: logits blended, rows of labels as they are finished."""

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from tools.augment import to_tensor
from tools.labels import IGNORE
from tools.progress import Progress
from tools.rasters import Raster, covering_starts

Predict = Callable[[Tensor], Tensor]  # windows (B,3,P,P) uint8 -> logits (B,K,P,P) float32


def label_strips(
    predict: Predict, raster: Raster, num_classes: int, *, size: int, stride: int, at_once: int, device: torch.device
) -> Iterator[np.ndarray]:
    """Class ids from top to bottom, a strip (h,W) uint8 for each row of windows; nodata is 255.

    size: of a window; stride: from one window to the next; at_once: windows of one batch; device: of the logits.
    Where windows overlap, their logits are summed with weights that fall smoothly to nearly 0 at
    the border of a window, where it sees least of the surroundings. The class of the largest sum
    wins, so the weights need not add up to 1. Sums are kept for one row of windows at a time: K * P
    * W * 4 bytes. A scene smaller than a window is mirrored at its border.
    """
    height, width = raster.shape
    padded_height, padded_width = max(height, size), max(width, size)
    tops = covering_starts(padded_height, size, stride)
    lefts = covering_starts(padded_width, size, stride)
    weight = blending_weight(size).to(device)
    sums = torch.zeros(num_classes, size, padded_width, device=device)
    with Progress(len(tops) * len(lefts), raster.path.name, "window") as bar:
        for top, next_top in pairwise([*tops, padded_height]):
            valid = raster.valid(top, 0, min(size, height), width)
            occupied = [left for left in lefts if valid[:, left : left + size].any()]
            bar.update(len(lefts) - len(occupied))
            for start in range(0, len(occupied), at_once):
                batch = occupied[start : start + at_once]
                logits = predict(torch.stack([_window(raster, top, left, size) for left in batch]))
                for left, window in zip(batch, logits, strict=True):
                    sums[:, :, left : left + size] += weight * window
                bar.update(len(batch))
            rows = next_top - top  # the next windows begin below them
            valid = valid[:rows]
            labels = sums[:, :rows].argmax(0).to(torch.uint8).cpu().numpy()
            yield np.where(valid, labels[: len(valid), :width], IGNORE)
            unfinished = sums[:, rows:].clone()
            sums.zero_()
            sums[:, : size - rows] = unfinished


def blending_weight(size: int) -> Tensor:
    """(P,P) float32: squared sines along both sides, highest in the middle, above 0 everywhere."""
    side = torch.sin(torch.pi * (torch.arange(size) + 0.5) / size) ** 2
    return side[:, None] * side


def _window(raster: Raster, top: int, left: int, size: int) -> Tensor:
    """(3,P,P) uint8, mirrored beyond the border of a scene that is smaller."""
    height, width = (min(size, length) for length in raster.shape)
    pixels = raster.read(top, left, height, width)
    if (height, width) != (size, size):
        pixels = np.pad(pixels, ((0, size - height), (0, size - width), (0, 0)), mode="reflect")
    return to_tensor(np.array(pixels))
