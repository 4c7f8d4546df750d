"""A batch in parts that fit into the device's memory: halved when the memory is full, and small from then on."""

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

T = TypeVar("T")
FULL = ("out of memory", "ried to allocate", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def memory_is_full(error: BaseException) -> bool:
    """Whether torch, CUDA, cuBLAS or cuDNN could not allocate memory; not all of them raise OutOfMemoryError."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in FULL)


class Parts:
    """How many images, or points, the device holds at once; found by halving, and kept.

    size: the number to begin with; 0: all. what: for the line that reports a halving, "images" for one; option: the
    constant that would begin with fewer.
    """

    def __init__(self, size: int = 0, what: str = "images", option: str = "images_at_once"):
        self.size, self.what, self.option = size, what, option

    def __call__(self, work: Callable[[int], T], whole: int) -> T:
        """work(size) for a size of at most `whole`, called again with half the size each time the memory is full.

        Raises the error of `work` when the size is 1. Sums in floating point depend on the size of a batch, so that
        the results of halves equal those of the whole within rounding.
        """
        while True:
            size = min(self.size or whole, whole)
            try:
                return work(size)
            except RuntimeError as error:
                if size <= 1 or not memory_is_full(error):
                    raise
            # Outside of the except block, which holds the tensors of the failed call
            self.size = (size + 1) // 2
            torch.accelerator.empty_cache()
            tqdm.write(
                f"the device's memory is too small for {size} {self.what} at once: continuing with {self.size} "
                f"({self.option} = {self.size} begins with that)",
                file=sys.stderr,
            )

    def predict(self, predict: Callable[[list[Tensor]], Sequence[Tensor]], images: Sequence[Tensor]) -> list[Tensor]:
        """`predict`, which maps images (B,...) at each scale to tensors (B,...), called with as many as fit at once."""

        def work(size: int) -> list[Tensor]:
            parts = zip(*(scale.split(size) for scale in images), strict=True)
            found = [predict(list(part)) for part in parts]
            return [torch.cat(tensors) for tensors in zip(*found, strict=True)]

        return self(work, len(images[0]))


class MicroBatches:
    """Losses and gradients of a batch, computed in micro-batches that fit into the memory.

    compute_loss(model, images, targets) -> {"loss": total, ...parts}: scalars, each a mean over what `count` counts,
    with which micro-batches are weighted. count(targets) -> what a loss is a mean over: by default the images; for a
    cross-entropy that ignores pixels, the labelled pixels. size: images of a micro-batch; 0: the whole batch.

    seen: a list to which compute_loss appends; what a call appended before the memory was full is removed again.

    Losses and gradients equal those of the whole batch within rounding where BatchNorm's statistics are frozen
    (step 5); dropout draws other random numbers. In step 1 BatchNorm uses the statistics of each micro-batch, and its
    running statistics move once for each: `micro_batch` is then a setting that changes results.

    A full memory halves the size in a run of one process. Several processes wait for each other's gradients, so that
    one cannot compute its part again: there the error ends the run.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        compute_loss: Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]],
        size: int = 0,
        count: Callable[[Tensor], Tensor | int] = len,
        seen: list | None = None,
    ):
        self.accelerator, self.compute_loss, self.count = accelerator, compute_loss, count
        self.seen: list = [] if seen is None else seen
        self.parts = Parts(size, "training images", "micro_batch")

    def __call__(
        self, model: nn.Module, optimiser: torch.optim.Optimizer, images: Tensor, targets: Tensor
    ) -> dict[str, Tensor]:
        """images (B,3,H,W), targets (B,...) -> the batch's losses, detached; its gradients are in the parameters."""

        before = len(self.seen)

        def work(size: int) -> dict[str, Tensor]:
            del self.seen[before:]
            optimiser.zero_grad(set_to_none=True)  # before the forward pass, whose memory the old gradients would take
            return self._passes(model, images, targets, size)

        if self.accelerator.num_processes > 1:
            return work(self.parts.size or len(images))
        return self.parts(work, len(images))

    def _passes(self, model: nn.Module, images: Tensor, targets: Tensor, size: int) -> dict[str, Tensor]:
        counts = [self.count(part) for part in targets.split(size)]
        whole = sum(counts)
        if isinstance(whole, Tensor):  # gradients are averaged over processes, whose counts differ; images do not
            whole = self.accelerator.reduce(whole.float(), "mean").clamp_min(1)
        losses: dict[str, Tensor] = {}
        for index, (count, some, their) in enumerate(
            zip(counts, images.split(size), targets.split(size), strict=True), start=1
        ):
            # Gradients are exchanged between processes once, after the last micro-batch
            with nullcontext() if index == len(counts) else self.accelerator.no_sync(model):
                with self.accelerator.autocast():
                    found = self.compute_loss(model, some, their)
                self.accelerator.backward(found["loss"] * (count / whole))
            for name, value in found.items():
                losses[name] = losses.get(name, 0.0) + value.detach() * (count / whole)
        return losses
