"""Peak memory of a training step, counted without computing, for the whole batch and for micro-batches.

A step of the loops of steps 1 and 5 runs under torch's FakeTensorMode: tensors have sizes but no values, and the sizes
of all that live at the same time are added up: weights, gradients, momentum, activations and the batch. A GPU needs
some hundred MB more, for its context and for the workspaces of its convolutions.

Command: python benchmarks/memory.py
"""

import multiprocessing
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from training import Constants as TrainingConstants
from training import batch_of, losses_of, model_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from models.deeplab import DeepLabV3Plus
from tools.devices import make_accelerator


@dataclass(frozen=True)
class Constants:
    sizes: tuple[int, ...] = (256, 512)  # sides in pixels
    backbone: str = "resnet50"
    num_classes: int = 16
    batch_sizes: tuple[int, int] = (8, 16)  # of classification and segmentation, as in the paper
    parts: tuple[int, ...] = (1, 2, 4)  # into how many micro-batches a batch is cut
    precisions: tuple[str, ...] = ("fp32", "bf16")


class PeakMemory(TorchDispatchMode):
    """`peak`: the most bytes that tensors made inside, or passed in, held at one time."""

    def __init__(self, *tensors: Tensor):
        super().__init__()
        self.held, self.peak, self.known = 0, 0, WeakIdKeyDictionary()
        for tensor in tensors:
            self._add(tensor)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self.known:  # views share the storage of another tensor
            self.known[storage] = True
            self.held += storage.nbytes()
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._remove, storage.nbytes())

    def _remove(self, size: int) -> None:
        self.held -= size

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._add(value)
        return result


def peak_of(training: str, size: int, precision: str, parts: int, args: Constants) -> float:
    """GiB of two steps, the second of which finds gradients and momentum of the first."""
    settings = TrainingConstants(backbone=args.backbone, num_classes=args.num_classes, batch_sizes=args.batch_sizes)
    accelerator = make_accelerator(precision, "cpu")
    with FakeTensorMode():
        model, _ = model_of(training, settings)
        if isinstance(model, DeepLabV3Plus):
            model.freeze_norm = True  # step 5's default; the benchmark of its speed has no statistics to freeze
        model.train()
        images, targets = batch_of(training, size, settings)
        optimiser = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, nesterov=True)
        micro_batch = -(-len(images) // parts)
        with PeakMemory(*model.parameters(), *model.buffers(), images, targets) as memory:
            for _ in range(2):
                optimiser.zero_grad(set_to_none=True)
                for part, part_targets in zip(images.split(micro_batch), targets.split(micro_batch), strict=True):
                    with accelerator.autocast():
                        losses = losses_of(training, model, part, part_targets)
                    losses["loss"].backward()
                optimiser.step()
    return memory.peak / 2**30


def main(args: Constants) -> None:
    print(f"peak GiB of a training step, {args.backbone}, {args.num_classes} classes")
    # a new process for each figure, because a process has one precision
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for training, batch in zip(("classification", "segmentation"), args.batch_sizes, strict=True):
            for size in args.sizes:
                for precision in args.precisions:
                    peaks = [pool.apply(peak_of, (training, size, precision, parts, args)) for parts in args.parts]
                    cut = ", ".join(
                        f"{peak:.2f} with {-(-batch // parts)} at once"
                        for parts, peak in zip(args.parts, peaks, strict=True)
                    )
                    print(f"{training:14} {batch:2} x {size} x {size}, {precision}: {cut}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Constants, description=__doc__))
