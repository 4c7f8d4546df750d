"""What the two trainings share: parameter groups, schedule, epochs, checkpoints and logs."""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from torch.utils.tensorboard import SummaryWriter
from torchvision.models import get_model_weights

from models.backbone import Backbone
from tools.augment import TrainingPatches
from tools.command import UserError, check
from tools.files import write_whole
from tools.logs import read_log
from tools.memory import MicroBatches
from tools.progress import Progress
from tools.review import average_precision

FEW_PATCHES = 2000
# step -> constants for fewer patches; how they were chosen: "A few hundred patches" in docs/own_data.md
SMALL_DATA = {5: "--epochs 30 --batch-size 8 --width 128"}
FROM_SCRATCH = {  # without pretrained weights
    1: "--train-all --lr 0.003 --momentum 0.9 --epochs 25",
    5: f"--no-freeze-norm --lr 0.003 --momentum 0.9 {SMALL_DATA[5]}",
}

Losses = dict[str, Tensor]  # "loss", the total, and its parts: scalars
ComputeLoss = Callable[[nn.Module, Tensor, Tensor], Losses]  # model, images, targets -> losses


class Recipe(Protocol):
    """The constants that a training needs."""

    @property
    def weights(self) -> str: ...
    @property
    def epochs(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def micro_batch(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def momentum(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def seed(self) -> int: ...
    @property
    def compile(self) -> bool: ...
    @property
    def workers(self) -> int: ...


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


def check_recipe(args: Recipe, patches: int) -> None:
    """Raise `UserError` for constants that cannot work on this machine or with this many patches."""
    file = Path(args.weights)
    check(args.weights in ("imagenet", "none") or file.is_file(), f"the weights file {file} is missing")
    compiler = os.environ.get("CXX", "g++")
    check(
        not args.compile or bool(shutil.which(compiler)),
        f"compile is True, but torch.compile needs the C++ compiler {compiler}: install it, or use --no-compile",
    )
    EpochBatches(patches, args.batch_size, args.seed)


def advise(args: Recipe, paper: Recipe, patches: int) -> str:
    """Where few patches meet the rates of `paper`: other constants, to be pasted; otherwise nothing."""
    if patches >= FEW_PATCHES or (args.lr, args.momentum) != (paper.lr, paper.momentum):
        return ""
    steps = FROM_SCRATCH if args.weights == "none" else SMALL_DATA
    lines = [f"  step {step}: {words}" for step, words in steps.items()]
    return "\n".join(
        [
            f"note: the paper's constants are made for thousands of patches. For {patches} train patches these do as "
            'well in less time, or better ("A few hundred patches" in docs/own_data.md):',
            *lines,
        ]
    )


def load_backbone(name: str, weights: str) -> Backbone:
    """The backbone of a training; raises `UserError` where its weights cannot be read or downloaded."""
    if weights == "none":
        return Backbone(name, "none")
    if weights != "imagenet":
        try:
            return Backbone(name, _read_weights(Path(weights)))
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


def _read_weights(file: Path) -> Any:
    """The content of a file of tensors, without running code from it."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"the weights file {file} is missing: correct the path") from None
    except Exception as error:  # torch has no common class for damaged files and for pickled code
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the weights file {file} cannot be read as a plain state dict ({reason}): copy the file again, or save "
            "model.state_dict() with torch.save"
        ) from None


class EpochBatches(Sampler):
    """Batches of (epoch, index) in an order given by seed and epoch alone; each process takes its part of every batch.

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
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        state = checkpoint["model"]
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run the training again") from None
    except Exception as error:  # torch has no common class for damaged and hostile files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} cannot be read as a checkpoint ({reason[:120]}): train again with --overwrite"
        ) from None
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:  # the last two where it is no state dict at all
        lines = str(error).splitlines()
        difference = lines[1].strip() if len(lines) > 1 else str(error)
        raise UserError(f"{path} was made for another backbone or number of classes ({difference[:160]})") from None
    return checkpoint


class Training:
    """A model under training: its patches, its loss, its optimiser, and how many epochs it has seen.

    The `pretrained` modules learn at the base rate, the other children of `model` at ten times the base rate.
    compute_loss(model, images, targets) -> {"loss": total, ...parts}; `count(targets)`: what a loss is a mean over;
    `seen`: a list to which compute_loss appends, such as `ClassScores.seen`.
    """

    def __init__(
        self,
        model: nn.Module,
        pretrained: Sequence[nn.Module],
        patches: TrainingPatches,
        compute_loss: ComputeLoss,
        args: Recipe,
        accelerator: Accelerator,
        *,
        count: Callable[[Tensor], Tensor | int] = len,
        seen: list | None = None,
    ):
        self.args, self.accelerator = args, accelerator
        self.micro_batches = MicroBatches(accelerator, compute_loss, args.micro_batch, count, seen)
        self.sampler = EpochBatches(
            len(patches), args.batch_size, args.seed, accelerator.process_index, accelerator.num_processes
        )
        # Workers get the epoch through the sampler's (epoch, index), so they may live through all epochs. DataLoader
        # draws seeds of its workers, which nothing uses, from a generator of its own: dropout would draw others.
        self.loader = DataLoader(
            patches,
            batch_sampler=self.sampler,
            num_workers=args.workers,
            pin_memory=accelerator.device.type == "cuda",
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
        self.raw: nn.Module = model  # without the wrapper of several processes
        self.model: nn.Module = model
        self.epoch, self.best = 0, -math.inf

    @property
    def steps(self) -> int:
        """Batches of the whole training."""
        return self.args.epochs * len(self.sampler)

    def resume(self, checkpoint_file: Path) -> None:
        """Continue after the last finished epoch of a stopped training; raises `UserError` for a broken checkpoint."""
        if not checkpoint_file.exists():
            return
        checkpoint = load_checkpoint(checkpoint_file, self.raw)
        try:
            before = checkpoint["optimiser"]
            parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
            for index, state in before["state"].items():  # the fused optimiser does not check shapes itself
                buffer = state.get("momentum_buffer")
                if buffer is not None and buffer.shape != parameters[index].shape:
                    raise ValueError("momentum of another shape")
            self.optimiser.load_state_dict(before)
            self.epoch, self.best = int(checkpoint["epoch"]), float(checkpoint["best"])
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise UserError(f"{checkpoint_file} cannot be continued from: train again with --overwrite") from None
        done = "is finished" if self.epoch >= self.args.epochs else "continues"
        self.accelerator.print(f"the training {done} after epoch {self.epoch} of {self.args.epochs}")

    def prepare(self) -> None:
        """Move model and optimiser to the device and, where there are several, into all processes."""
        device = self.accelerator.device
        model = self.raw.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.accelerator.num_processes > 1 and device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if self.args.compile:
            model.compile()  # in place, so that the names in checkpoints stay
        self.model, self.optimiser = self.accelerator.prepare(model, self.optimiser)
        self.raw = self.accelerator.unwrap_model(self.model)

    def train_one_epoch(self, bar: Progress) -> dict[str, float]:
        """One pass over the patches -> means of the losses over it."""
        args, device, epoch = self.args, self.accelerator.device, self.epoch
        # dropout is random through (seed, epoch, process) alone, so that a resumed run repeats an uninterrupted one
        torch.manual_seed((args.seed * 100_003 + epoch) * 4_099 + self.accelerator.process_index)
        self.sampler.epoch = epoch
        self.model.train()
        sums: dict[str, Tensor] = {}
        for step, (images, targets) in enumerate(self.loader, start=epoch * len(self.sampler)):
            for group, rate in zip(self.optimiser.param_groups, self.base_rates, strict=True):
                group["lr"] = rate * (1 - step / self.steps) ** 0.9
            images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
            targets = targets.to(device, non_blocking=True)
            losses = self.micro_batches(self.model, self.optimiser, images, targets)
            self.optimiser.step()
            for name, value in losses.items():  # summed on the device: reading them each step would stall it
                sums[name] = sums.get(name, torch.zeros((), device=device)) + value
            bar.update()
        self.epoch += 1
        return {name: float(self.accelerator.reduce(value, "mean")) / len(self.sampler) for name, value in sums.items()}


class ClassScores:
    """Logits of the training patches, as they pass through the model, and the labels they should meet."""

    def __init__(self, classes: tuple[str, ...], accelerator: Accelerator):
        self.classes, self.accelerator = classes, accelerator
        self.seen: list[tuple[Tensor, Tensor]] = []

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """A batch: logits (B,K), image-level labels (B,K)."""
        self.seen.append((logits.detach().float(), labels))

    def average_precision(self) -> dict[str, dict[str, float]]:
        """{"average_precision": {class: value}} of the patches added since the last call, in all processes."""
        logits, labels = (
            self.accelerator.gather(torch.cat(parts)).cpu().numpy() for parts in zip(*self.seen, strict=True)
        )
        self.seen.clear()
        return {
            "average_precision": {
                name: round(average_precision(labels[:, k] > 0, logits[:, k]), 4)
                for k, name in enumerate(self.classes)
                if (labels[:, k] > 0).any()
            }
        }


def train(
    training: Training,
    folder: Path,
    select: Callable[[nn.Module], float] | None = None,
    measure: Callable[[], dict[str, Any]] | None = None,
) -> None:
    """Train the epochs that are left; write model.pt, checkpoint.pt, log.jsonl and TensorBoard files to `folder`.

    After each epoch the state goes to checkpoint.pt, from which a stopped training continues with equal results, and
    one line of figures to log.jsonl, which `measure` may add to. model.pt is the last epoch's, or, with `select`, that
    of the highest `select(model)`.
    """
    checkpoint_file, log_file = folder / "checkpoint.pt", folder / "log.jsonl"
    main = training.accelerator.is_main_process
    training.resume(checkpoint_file)
    training.prepare()
    left, steps = training.args.epochs - training.epoch, len(training.sampler)
    if main:
        _cut_log(log_file, training.epoch)
    if left <= 0:
        return
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=training.epoch * steps) if main else None
    bar = Progress(training.steps, "training", "batch", initial=training.epoch * steps, shown=main)
    while training.epoch < training.args.epochs:
        start = time.perf_counter()
        bar.set_description(f"training, epoch {training.epoch + 1} of {training.args.epochs}", refresh=False)
        means = training.train_one_epoch(bar)
        bar.note(f"loss {means['loss']:.4f}")
        check(
            math.isfinite(means["loss"]),
            f"the loss became {means['loss']} in epoch {training.epoch}: lower lr ({training.args.lr}); the state "
            f"after epoch {training.epoch - 1} is kept in {checkpoint_file}",
        )
        row: dict[str, Any] = {"epoch": training.epoch, "step": training.epoch * steps, **means}
        row["lr"] = training.optimiser.param_groups[0]["lr"]
        row["images_per_second"] = round(steps * training.args.batch_size / (time.perf_counter() - start), 2)
        if (size := training.micro_batches.parts.size) != training.args.micro_batch:
            row["micro_batch"] = size  # halved because the memory was full: changes step 1's BatchNorm statistics
        if measure:
            row |= measure()
        if select:
            row["train_miou"] = select(training.raw)
        if not main or writer is None:
            continue
        _log(log_file, row)
        for name, value in row.items():
            if isinstance(value, dict):  # one value for each class
                for key, part in value.items():
                    writer.add_scalar(f"{name}/{key}", part, row["step"])
            elif name not in ("epoch", "step"):
                writer.add_scalar(name, value, row["step"])
        if not select or row["train_miou"] > training.best:
            save_checkpoint(folder / "model.pt", training.raw, epoch=training.epoch)
        training.best = max(training.best, row.get("train_miou", training.best))
        save_checkpoint(
            checkpoint_file,
            training.raw,
            optimiser=training.optimiser.state_dict(),
            epoch=training.epoch,
            best=training.best,
        )
    bar.close()
    if writer:
        writer.close()


def _log(path: Path, row: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _cut_log(path: Path, epochs: int) -> None:
    """Drop what a killed run logged after its last checkpoint."""
    rows = [row for row in read_log(path) if row["epoch"] <= epochs]
    with write_whole(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
