"""What the two trainings share: parameter groups, schedule, epochs, checkpoints and logs."""

import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from torch.utils.tensorboard import SummaryWriter
from torchvision.models import get_model_weights

from models.backbone import Backbone
from tools.augment import TrainingPatches
from tools.checkpoints import read_tensors
from tools.command import UserError, check
from tools.files import write_whole
from tools.labels import IGNORE
from tools.logs import read_log
from tools.progress import Progress
from tools.review import average_precision

FEW_PATCHES = 2000
# step -> constants for fewer patches; how they were chosen: "A few hundred patches" in docs/own_data.md
SMALL_DATA = {5: "--epochs 30 --batch-size 8 --width 128"}
FROM_SCRATCH = {  # without pretrained weights
    1: "--train-all --lr 0.003 --momentum 0.9 --epochs 25",
    5: f"--no-freeze-norm --lr 0.003 --momentum 0.9 {SMALL_DATA[5]}",
}


def parameter_groups(
    pretrained: Sequence[nn.Module], new: Sequence[nn.Module], lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """SGD groups of the recipe: pretrained weights lr, biases x2, new weights x10, new biases x20; decay on weights.

    BatchNorm's scale is a weight and its shift a bias.
    """
    groups = []
    for modules, factor in ((pretrained, 1), (new, 10)):
        named = [item for module in modules for item in module.named_parameters() if item[1].requires_grad]
        for bias in (False, True):
            parameters = [parameter for name, parameter in named if name.endswith("bias") == bias]
            if parameters:
                rate = lr * factor * (2 if bias else 1)
                decay = 0.0 if bias else weight_decay
                groups.append({"params": parameters, "lr": rate, "weight_decay": decay})
    return groups


def check_recipe(args: Any, patches: int) -> None:
    """Raise `UserError` for constants of a training that cannot work on this machine or with this many patches."""
    file = Path(args.weights)
    check(args.weights in ("imagenet", "none") or file.is_file(), f"the weights file {file} is missing")
    compiler = os.environ.get("CXX", "g++")
    check(
        not args.compile or bool(shutil.which(compiler)),
        f"compile is True, but torch.compile needs the C++ compiler {compiler}: install it, or use --no-compile",
    )
    EpochBatches(patches, args.batch_size, args.seed)


def advise(args: Any, patches: int) -> None:
    """Where patches are few and the paper's rates unchanged, print other constants, to be pasted."""
    paper = type(args)()
    if patches >= FEW_PATCHES or (args.lr, args.momentum) != (paper.lr, paper.momentum):
        return
    print(
        f"note: the paper's constants are made for thousands of patches. For {patches} train patches these do as "
        'well in less time, or better ("A few hundred patches" in docs/own_data.md):'
    )
    for step, words in (FROM_SCRATCH if args.weights == "none" else SMALL_DATA).items():
        print(f"  step {step}: {words}")


def load_backbone(name: str, weights: str) -> Backbone:
    """The backbone of a training; raises `UserError` where its weights cannot be read or downloaded."""
    if weights == "none":
        return Backbone(name, "none")
    if weights != "imagenet":
        state = read_tensors(Path(weights), "give a state dict of torchvision, written by torch.save")
        try:
            return Backbone(name, state)
        except ValueError as error:
            raise UserError(f"{weights}: {error}") from None
    try:
        return Backbone(name, "imagenet")
    except OSError as error:  # urllib's errors are of this class
        address = get_model_weights(name)["IMAGENET1K_V1"].url
        target = Path(torch.hub.get_dir()) / "checkpoints" / Path(address).name
        raise UserError(
            f"the ImageNet weights of {name} could not be downloaded ({error}): download {address} by other means to "
            f"{target}, or give a file with --weights FILE, or train without them: --weights none"
        ) from None


class EpochBatches(Sampler):
    """Batches of (epoch, index) in an order given by seed and epoch alone; each of n processes takes every n-th.

    The last incomplete batch is dropped.
    """

    def __init__(self, size: int, batch_size: int, seed: int, process: int = 0, processes: int = 1):
        check(
            batch_size % processes == 0,
            f"batch_size is {batch_size}, which cannot be shared out evenly to {processes} processes",
        )
        check(
            size >= batch_size,
            f"there are {size} training patches, fewer than one batch: lower batch_size ({batch_size})",
        )
        self.size, self.batch_size, self.seed, self.process, self.processes = size, batch_size, seed, process, processes
        self.epoch = 0

    def __len__(self) -> int:
        return self.size // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = torch.randperm(
            self.size, generator=torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        ).tolist()
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            batch = order[start : start + self.batch_size]
            yield [(self.epoch, index) for index in batch[self.process :: self.processes]]


def save_checkpoint(path: Path, model: nn.Module, **rest: Any) -> None:
    """Whole or not at all; plain tensors and numbers only, so that it loads with weights_only=True."""
    with write_whole(path) as temporary:
        torch.save({"model": model.state_dict(), **rest}, temporary)


def load_checkpoint(path: Path, model: nn.Module) -> dict[str, Any]:
    """Fill `model` from a checkpoint of `save_checkpoint`; raises `UserError` when it is damaged or does not fit."""
    remedy = "train again with --overwrite"
    checkpoint = read_tensors(path, remedy)
    check(isinstance(checkpoint, dict) and "model" in checkpoint, f"{path} is no checkpoint of a training: {remedy}")
    try:
        model.load_state_dict(checkpoint["model"])
    except (RuntimeError, TypeError, AttributeError) as error:  # the last two where it is no state dict at all
        lines = str(error).splitlines()
        difference = lines[1].strip() if len(lines) > 1 else str(error)
        raise UserError(f"{path} was made for another backbone or number of classes ({difference[:160]})") from None
    return checkpoint


class Training:
    """A model under training: batches, learning rates, device, checkpoint, log, several processes.

        training = Training(step, model, patches, pretrained=[model.backbone])
        with step.output(".pt"), training:
            for _ in training.epochs():
                for images, targets in training.batches():
                    training.backward(the loss of training.model(images) against targets)

    step: a `Step`, of which the constants, the accelerator and the output folder are used. The
    `pretrained` modules learn at the base rate, the other children of `model` at ten times that
    rate. `training.model` is the model to call in the loop: where several processes train, it
    wraps `model`.

    In the output folder: checkpoint.pt, the state after each epoch, from which a stopped training
    continues with equal results; model.pt, the last epoch's, or with `keep_best` the best one's;
    log.jsonl, a line for each epoch; tensorboard/.
    """

    def __init__(self, step: Any, model: nn.Module, patches: TrainingPatches, pretrained: Sequence[nn.Module] = ()):
        args = step.args
        self.args, self.accelerator, self.folder = args, step.accelerator, step.path
        self.checkpoint_file, self.log_file = self.folder / "checkpoint.pt", self.folder / "log.jsonl"
        self.is_main: bool = self.accelerator.is_main_process
        self.sampler = EpochBatches(
            len(patches), args.batch_size, args.seed, self.accelerator.process_index, self.accelerator.num_processes
        )
        # Workers get the epoch through the sampler's (epoch, index), so one set of workers serves all epochs.
        # DataLoader gets a generator of its own: its seeds of workers would shift the random numbers of dropout.
        self.loader = DataLoader(
            patches,
            batch_sampler=self.sampler,
            num_workers=args.workers,
            pin_memory=self.accelerator.device.type == "cuda",
            persistent_workers=args.workers > 0,
            generator=torch.Generator(),
        )
        new = [module for module in model.children() if module not in pretrained]
        self.optimiser: Any = torch.optim.SGD(
            parameter_groups(pretrained, new, args.lr, args.weight_decay),
            lr=args.lr,
            momentum=args.momentum,
            nesterov=args.momentum > 0,
            fused=True,  # one pass over the weights instead of one for each operation
        )
        self.base_rates = [group["lr"] for group in self.optimiser.param_groups]
        self.unwrapped = self.model = model  # `_prepare` wraps self.model where several processes train
        self.epoch, self.best = 0, -math.inf  # epochs that are finished; the highest score of `keep_best`

    def __enter__(self) -> Self:
        """Continue after the last finished epoch of a stopped training; model and optimiser go to the device."""
        self._resume()
        self._prepare()
        self.writer: Any = None
        done = self.epoch * len(self.sampler)
        if self.is_main:
            _cut_log(self.log_file, self.epoch)
            if self.epoch < self.args.epochs:
                self.writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=done)
        steps = self.args.epochs * len(self.sampler)
        self.bar = Progress(steps, "training", "batch", initial=min(done, steps), shown=self.is_main)
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.writer:
            self.writer.close()

    def epochs(self) -> Iterator[int]:
        """Yield the number of each epoch that is left, from 1; after its loop the epoch is logged and saved."""
        while self.epoch < self.args.epochs:
            self.epoch += 1
            self._sums: dict[str, Tensor] = {}
            self._row: dict[str, Any] = {}
            self._score: float | None = None
            self.bar.set_description(f"training, epoch {self.epoch} of {self.args.epochs}", refresh=False)
            yield self.epoch
            self._end_epoch()
        self.accelerator.wait_for_everyone()  # model.pt, which the main process writes, is there for all of them

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images (B,3,S,S) and targets of each batch on the device.

        With `micro_batch` a batch comes in parts, and the optimiser makes its step after the last
        one. The gradients of the parts add up to those of the whole batch within rounding where
        BatchNorm's statistics are frozen (step 5). In step 1 BatchNorm uses the statistics of each
        part, so that `micro_batch` changes results.
        """
        device, epoch, steps = self.accelerator.device, self.epoch - 1, self.args.epochs * len(self.sampler)
        # dropout is random through (seed, epoch, process) alone, so that a resumed run repeats an uninterrupted one
        torch.manual_seed((self.args.seed * 100_003 + epoch) * 4_099 + self.accelerator.process_index)
        self.sampler.epoch = epoch
        self.model.train()
        start = time.perf_counter()
        for step, (images, targets) in enumerate(self.loader, start=epoch * len(self.sampler)):
            for group, rate in zip(self.optimiser.param_groups, self.base_rates, strict=True):
                group["lr"] = rate * (1 - step / steps) ** 0.9
            self.optimiser.zero_grad(set_to_none=True)  # before the forward pass, which needs the memory
            images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
            targets = targets.to(device, non_blocking=True)
            yield from self._parts(images, targets)
            self.optimiser.step()
            self.bar.update()
        seconds = time.perf_counter() - start
        self._row["images_per_second"] = round(len(self.sampler) * self.args.batch_size / seconds, 2)

    def _parts(self, images: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The batch in parts of `micro_batch` patches; sets the weight of each part's loss."""
        size = self.args.micro_batch or len(images)
        parts = list(zip(images.split(size), targets.split(size), strict=True))
        # A loss is a mean over labelled pixels, or over the values of image-level labels, which are never 255
        counts = [(part != IGNORE).sum() for _, part in parts]
        # Gradients are averaged over processes: with the mean count they become those of the mean over all values
        total = self.accelerator.reduce(torch.stack(counts).sum().float(), "mean").clamp_min(1)
        for number, (part, count) in enumerate(zip(parts, counts, strict=True), start=1):
            self._weight = count / total
            # Processes exchange their gradients once, after the last part
            with nullcontext() if number == len(parts) else self.accelerator.no_sync(self.model):
                yield part

    def backward(self, loss: Tensor, **losses: Tensor) -> None:
        """The backward pass of a loss, a mean over what `batches` gave; `losses` are further ones to log.

        `batches` makes the optimiser's step when its loop goes on.
        """
        self.accelerator.backward(loss * self._weight)
        for name, value in {"loss": loss, **losses}.items():  # summed on the device: reading them would stall a GPU
            self._sums[name] = self._sums.get(name, 0.0) + value.detach() * self._weight

    def log(self, **values: Any) -> None:
        """Add values, such as {class: value}, to this epoch's line of the log."""
        self._row |= values

    def keep_best(self, **score: float) -> None:
        """Log a score of this epoch; model.pt becomes this epoch only if the score is the highest so far."""
        self._row |= score
        (self._score,) = score.values()

    def _end_epoch(self) -> None:
        means = {
            name: float(self.accelerator.reduce(value, "mean")) / len(self.sampler)
            for name, value in self._sums.items()
        }
        self.bar.note(f"loss {means['loss']:.4f}")
        kept = f"; the state after epoch {self.epoch - 1} is kept in {self.checkpoint_file}" if self.epoch > 1 else ""
        check(
            math.isfinite(means["loss"]),
            f"the loss became {means['loss']} in epoch {self.epoch}: lower lr ({self.args.lr}){kept}",
        )
        if not self.is_main:
            return
        row = {"epoch": self.epoch, "step": self.epoch * len(self.sampler)} | means
        row["lr"] = self.optimiser.param_groups[0]["lr"]
        row |= self._row
        with open(self.log_file, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._write_scalars(row)
        if self._score is None or self._score > self.best:  # None: `keep_best` is not used, the last epoch is kept
            save_checkpoint(self.folder / "model.pt", self.unwrapped, epoch=self.epoch)
        self.best = max(self.best, self.best if self._score is None else self._score)
        save_checkpoint(
            self.checkpoint_file,
            self.unwrapped,
            optimiser=self.optimiser.state_dict(),
            epoch=self.epoch,
            best=self.best,
        )

    def _write_scalars(self, row: dict[str, Any]) -> None:
        """A line of the log for TensorBoard; an entry with a value for each class becomes a group of curves."""
        for name, value in row.items():
            if isinstance(value, dict):
                for part, number in value.items():
                    self.writer.add_scalar(f"{name}/{part}", number, row["step"])
            elif name not in ("epoch", "step"):
                self.writer.add_scalar(name, value, row["step"])

    def _resume(self) -> None:
        """Load checkpoint.pt, if there is one; raises `UserError` for a broken one."""
        if not self.checkpoint_file.exists():
            return
        checkpoint = load_checkpoint(self.checkpoint_file, self.unwrapped)
        try:
            optimiser = checkpoint["optimiser"]
            parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
            for index, state in optimiser["state"].items():  # the fused optimiser does not check shapes itself
                buffer = state.get("momentum_buffer")
                if buffer is not None and buffer.shape != parameters[index].shape:
                    raise ValueError("momentum of another shape")
            self.optimiser.load_state_dict(optimiser)
            self.epoch, self.best = int(checkpoint["epoch"]), float(checkpoint["best"])
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise UserError(f"{self.checkpoint_file} cannot be continued from: train again with --overwrite") from None
        done = "is finished" if self.epoch >= self.args.epochs else "continues"
        self.accelerator.print(f"the training {done} after epoch {self.epoch} of {self.args.epochs}")

    def _prepare(self) -> None:
        """Move model and optimiser to the device and, where there are several, into all processes."""
        device = self.accelerator.device
        model = self.unwrapped.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.accelerator.num_processes > 1 and device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if self.args.compile:
            model.compile()  # in place, so that the names in checkpoints stay
        self.model, self.optimiser = self.accelerator.prepare(model, self.optimiser)
        self.unwrapped = self.accelerator.unwrap_model(self.model)


class ClassScores:
    """Logits of the training patches, as they pass through the model, and the labels they should meet."""

    def __init__(self, classes: tuple[str, ...], accelerator: Accelerator):
        self.classes, self.accelerator = classes, accelerator
        self.batches: list[tuple[Tensor, Tensor]] = []

    def add(self, logits: Tensor, image_labels: Tensor) -> None:
        """A batch: logits (B,K), image-level labels (B,K)."""
        self.batches.append((logits.detach().float(), image_labels))

    def average_precision(self) -> dict[str, float]:
        """Class -> average precision, of the patches added since the last call, in all processes."""
        logits, image_labels = (
            self.accelerator.gather(torch.cat(parts)).cpu().numpy() for parts in zip(*self.batches, strict=True)
        )
        self.batches.clear()
        values = {}
        for k, name in enumerate(self.classes):
            present = image_labels[:, k] > 0
            if present.any():
                values[name] = round(average_precision(present, logits[:, k]), 4)
        return values


def _cut_log(path: Path, epochs: int) -> None:
    """Drop what a killed run logged after its last checkpoint."""
    rows = [row for row in read_log(path) if row["epoch"] <= epochs]
    with write_whole(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
