"""What the two trainings share: parameter groups, schedule, epochs, checkpoints and logs."""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from tools.augment import TrainingPatches
from tools.command import UserError, check
from tools.files import write_whole
from tools.step import StepFolder


def make_accelerator(precision: str = "auto") -> Accelerator:
    """Accelerate's device and processes. "auto" is bf16 where GPU or CPU (AMX) compute in it, and fp32 elsewhere."""
    if precision == "auto":
        on_gpu = torch.cuda.is_available()
        fast = torch.cuda.is_bf16_supported(False) if on_gpu else torch.cpu.get_capabilities().get("amx_tile")
        precision = "bf16" if fast else "fp32"
    # told that there is no GPU, processes on CPUs share the work too; left alone, each would do all of it
    return Accelerator(mixed_precision="bf16" if precision == "bf16" else "no", cpu=not torch.cuda.is_available())


def precision_of(accelerator: Accelerator) -> str:
    """What "auto" has become, for run.json: a run continued on a machine that computes otherwise is refused."""
    return "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision


def parameter_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict]:
    """SGD groups of the recipe: pretrained weights lr, biases x2, new weights x10, new biases x20; decay on weights.

    BatchNorm's scale is a weight and its shift a bias.
    """
    groups = []
    for modules, factor in ((model.pretrained, 1), (model.new, 10)):
        named = [item for module in modules for item in module.named_parameters() if item[1].requires_grad]
        for bias in (False, True):
            parameters = [parameter for name, parameter in named if name.endswith("bias") == bias]
            if parameters:
                groups.append(
                    {
                        "params": parameters,
                        "lr": lr * factor * (2 if bias else 1),
                        "weight_decay": 0.0 if bias else weight_decay,
                    }
                )
    return groups


def check_recipe(constants, patches: int) -> None:
    """Raise `UserError` for a constant that no training of this many patches can work with; before a folder is made."""
    for name, fits, demand in (
        ("epochs", constants.epochs >= 1, "at least 1"),
        ("batch_size", constants.batch_size >= 1, "at least 1"),
        ("lr", 0 < constants.lr < math.inf, "above 0"),
        ("momentum", 0 <= constants.momentum < 1, "from 0 to below 1"),
        ("weight_decay", 0 <= constants.weight_decay < math.inf, "0 or more"),
        ("workers", constants.workers >= 0, "0 or more"),
        ("seed", 0 <= constants.seed < 2**31, "from 0 to 2147483647"),
    ):
        check(fits, f"{name} is {getattr(constants, name)}, but it must be {demand}")
    file = Path(constants.weights)
    check(constants.weights in ("imagenet", "none") or file.is_file(), f"the weights file {file} is missing")
    compiler = os.environ.get("CXX", "g++")
    check(
        not constants.compile or bool(shutil.which(compiler)),
        f"compile is True, but torch.compile needs the C++ compiler {compiler}: install it, or leave out --compile",
    )
    EpochBatches(patches, constants.batch_size, constants.seed)


class EpochBatches(Sampler):
    """Batches of (epoch, index) in an order given by seed and epoch alone; each process takes its part of every batch.

    The last incomplete batch is dropped.
    """

    def __init__(self, size: int, batch_size: int, seed: int, process: int = 0, processes: int = 1):
        if batch_size % processes:
            raise UserError(f"batch_size is {batch_size}, which cannot be shared out evenly to {processes} processes")
        if size < batch_size:
            raise UserError(f"there are {size} training patches, fewer than one batch: lower batch_size ({batch_size})")
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


def save_checkpoint(path: Path, model: nn.Module, **rest) -> None:
    """Whole or not at all; plain tensors and numbers only, so that it loads with weights_only=True."""
    with write_whole(path) as temporary:
        torch.save({"model": model.state_dict(), **rest}, temporary)


def load_checkpoint(path: Path, model: nn.Module) -> dict:
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
        difference = str(error).splitlines()[1].strip() if len(str(error).splitlines()) > 1 else str(error)
        raise UserError(f"{path} was made for another backbone or number of classes ({difference[:160]})") from None
    return checkpoint


def train(
    model: nn.Module,
    patches: TrainingPatches,
    compute_loss: Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]],
    constants,
    folder: StepFolder,
    accelerator: Accelerator,
    select: Callable[[nn.Module], float] | None = None,
) -> None:
    """Train `model` for constants.epochs with the paper's recipe and leave model.pt, log.jsonl and TensorBoard files.

    compute_loss(model, images, targets) -> {"loss": total, ...parts} of scalars. After each epoch the state goes to
    checkpoint.pt, from which a killed training continues with equal results. Without `select` model.pt is the last
    epoch's; with it the epoch of the highest `select(model)`.
    """
    device, main = accelerator.device, accelerator.is_main_process
    sampler = EpochBatches(
        len(patches), constants.batch_size, constants.seed, accelerator.process_index, accelerator.num_processes
    )
    # Workers see the epoch through the sampler's (epoch, index), so they may live through all epochs. The loader draws
    # its workers' seeds, which nothing uses, from a generator of its own: dropout's would be changed by them.
    loader = DataLoader(
        patches,
        batch_sampler=sampler,
        num_workers=constants.workers,
        pin_memory=device.type == "cuda",
        persistent_workers=constants.workers > 0,
        generator=torch.Generator(),
    )
    optimiser = torch.optim.SGD(
        parameter_groups(model, constants.lr, constants.weight_decay),
        lr=constants.lr,
        momentum=constants.momentum,
        nesterov=constants.momentum > 0,
        fused=True,  # one pass over the weights instead of one for each operation
    )
    base_rates = [group["lr"] for group in optimiser.param_groups]
    steps = constants.epochs * len(sampler)
    checkpoint_file, first, best = folder.folder / "checkpoint.pt", 0, -math.inf
    if checkpoint_file.exists():
        checkpoint = load_checkpoint(checkpoint_file, model)
        try:
            optimiser.load_state_dict(checkpoint["optimiser"])
            first, best = checkpoint["epoch"], checkpoint["best"]
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{checkpoint_file} is no state to continue from: train again with --overwrite") from None
        accelerator.print(f"continuing after epoch {first} of {constants.epochs}")
    model = model.to(device, memory_format=torch.channels_last)
    if accelerator.num_processes > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if constants.compile:
        model.compile()  # in place, so that the names in checkpoints stay
    model, optimiser = accelerator.prepare(model, optimiser)
    raw = accelerator.unwrap_model(model)
    writer = SummaryWriter(str(folder.folder / "tensorboard"), purge_step=first * len(sampler)) if main else None
    log_file = folder.folder / "log.jsonl"
    if main:
        _cut_log(log_file, first)

    bar = tqdm(total=steps, initial=first * len(sampler), unit="batch", disable=None if main else True)
    for epoch in range(first, constants.epochs):
        # Dropout is random through (seed, epoch, process) alone: a continued training draws what the whole one drew.
        torch.manual_seed((constants.seed * 100_003 + epoch) * 4_099 + accelerator.process_index)
        sampler.epoch = epoch
        bar.set_description(f"training, epoch {epoch + 1} of {constants.epochs}")
        model.train()
        sums: dict[str, Tensor] = {}
        start = time.perf_counter()
        for step, (images, targets) in enumerate(loader, start=epoch * len(sampler)):
            for group, rate in zip(optimiser.param_groups, base_rates, strict=True):
                group["lr"] = rate * (1 - step / steps) ** 0.9
            images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
            targets = targets.to(device, non_blocking=True)
            with accelerator.autocast():
                losses = compute_loss(model, images, targets)
            optimiser.zero_grad(set_to_none=True)
            accelerator.backward(losses["loss"])
            optimiser.step()
            for name, value in losses.items():  # summed on the device: reading them each step would stall it
                sums[name] = sums.get(name, 0.0) + value.detach()
            bar.update()
        means = {name: float(accelerator.reduce(value, "mean")) / len(sampler) for name, value in sums.items()}
        seconds = time.perf_counter() - start
        if not math.isfinite(means["loss"]):
            raise UserError(
                f"the loss became {means['loss']} in epoch {epoch + 1}: lower lr ({constants.lr}); the state after "
                f"epoch {epoch} is kept in {checkpoint_file}"
            )
        row = {
            "epoch": epoch + 1,
            "step": (epoch + 1) * len(sampler),
            **means,
            "lr": optimiser.param_groups[0]["lr"],
            "images_per_second": round(len(sampler) * constants.batch_size / seconds, 2),
        }
        if select:
            row["train_miou"] = select(raw)
        if main:
            bar.set_postfix(loss=f"{means['loss']:.4f}")
            with open(log_file, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            for name, value in row.items():
                if name not in ("epoch", "step"):
                    writer.add_scalar(name, value, row["step"])
            if not select or row["train_miou"] > best:
                save_checkpoint(folder.folder / "model.pt", raw, epoch=epoch + 1)
            best = max(best, row.get("train_miou", best))
            save_checkpoint(checkpoint_file, raw, optimiser=optimiser.state_dict(), epoch=epoch + 1, best=best)
    bar.close()
    if main:
        writer.close()


def _cut_log(path: Path, epochs: int) -> None:
    """Drop what a killed run logged after its last checkpoint."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()[:epochs]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
