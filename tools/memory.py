"""As many images at once as the device's memory holds: halved when the memory is full, and small from then on."""

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

T = TypeVar("T")
FULL = ("out of memory", "ried to allocate", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def memory_is_full(error: BaseException) -> bool:
    """Whether torch, CUDA, cuBLAS or cuDNN could not allocate memory; not all of them raise OutOfMemoryError."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in FULL)


class Halving:
    """How many images, or points, the device computes at once: `size`, halved each time the memory is full, and kept.

    what: for the line that reports a halving; option: the constant that would begin with fewer. Floating-point sums
    depend on the size of a batch: the results of halves equal those of a whole batch only within rounding.
    """

    def __init__(self, size: int, what: str = "images", option: str = "images_at_once"):
        self.size, self.what, self.option = size, what, option

    def predict(
        self, predict: Callable[[list[Tensor]], Sequence[Tensor]], images: Sequence[Tensor], fill: bool = True
    ) -> list[Tensor]:
        """`predict`, which maps images (B,...) at each scale to tensors (B,...), called with `size` images at once.

        With `fill` a smaller batch is filled up with repetitions, and their results are cut off: an image gets the same
        result, bit for bit, in any batch.
        """
        outputs: list[list[Tensor]] = []
        start, count = 0, len(images[0])
        while start < count:
            batch = [scale[start : start + self.size] for scale in images]
            kept = len(batch[0])
            if fill and kept < self.size:
                batch = [torch.cat([scale, scale[:1].expand(self.size - kept, *scale.shape[1:])]) for scale in batch]
            try:
                results = predict(batch)
            except RuntimeError as error:
                if self.size == 1 or not memory_is_full(error):
                    raise
            else:
                outputs.append([result[:kept] for result in results])
                start += kept
                continue
            self._halve()  # outside of the except block, which holds the tensors of the failed call
        return [torch.cat(parts) for parts in zip(*outputs, strict=True)]

    def attempt(self, work: Callable[[int], T]) -> T:
        """work(size), called again with half the size each time the memory is full; raises its error at size 1."""
        while True:
            try:
                return work(self.size)
            except RuntimeError as error:
                if self.size == 1 or not memory_is_full(error):
                    raise
            self._halve()

    def _halve(self) -> None:
        before, self.size = self.size, (self.size + 1) // 2
        torch.accelerator.empty_cache()
        tqdm.write(
            f"the device's memory is too small for {before} {self.what} at once: continuing with {self.size} "
            f"({self.option} = {self.size} begins with that)",
            file=sys.stderr,
        )
