"""A training step our way and the plain way, for both trainings, and loading alone, to show which is the limit.

Plain: NCHW, float32, every loss read by .item() in every step. Ours: as tools/training.py; channels_last, bf16 where
the device computes in it, losses summed on the device, one fused optimiser. Both start from the same weights and see
the same batches; the weights are random, which does not change the cost. Each way runs in a process of its own, whose
growth (on a GPU: allocations) is the memory. Loading: read, resize, crop and normalise in one process, as in a worker.

Command: OMP_NUM_THREADS=1 python benchmarks/training.py, or with --images FOLDER on real images
"""

import multiprocessing
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import tyro
from measure import aerial_patch, measured
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_classification
import train_segmentation
from models.backbone import Backbone
from models.classifier import Classifier
from models.deeplab import DeepLabV3Plus
from models.ir_loss import image_reconstruction_loss
from tools.augment import TrainingPatches
from tools.devices import make_accelerator, start_line
from tools.labels import IGNORE, save_label
from tools.training import Training, parameter_groups


@dataclass(frozen=True)
class Constants:
    sizes: tuple[int, ...] | None = None  # sides in pixels; None: 128 on a CPU; 128, 256 and 512 on a GPU
    backbone: str = "resnet50"
    num_classes: int = 6
    batch_sizes: tuple[int, int] = (8, 16)  # of classification and segmentation, as in the paper
    steps: int = 2  # timed, after as many untimed ones
    compile: bool = False  # ours with torch.compile
    precision: str = "auto"  # of ours
    micro_batch: int = 0  # of ours: patches computed at once; 0: the whole batch
    load_sizes: tuple[int, ...] = (128, 256, 512)  # sides in pixels
    load_patches: int = 24  # of each size; read twice, the faster time is reported
    images: Path | None = None  # a folder of RGB images to cut patches from; None: blobs with texture


def batch_of(training: str, size: int, args: Constants) -> tuple[Tensor, Tensor]:
    """Random images and targets."""
    torch.manual_seed(1)
    count = args.batch_sizes[training == "segmentation"]
    images = torch.randn(count, 3, size, size)
    if training == "classification":
        return images, (torch.rand(count, args.num_classes) < 0.5).float()
    return images, torch.randint(0, args.num_classes, (count, size, size))


def model_of(training: str, args: Constants) -> tuple[nn.Module, nn.Module]:
    """Model and its backbone."""
    torch.manual_seed(0)
    backbone = Backbone(args.backbone, "none")
    if training == "classification":
        return Classifier(backbone, args.num_classes, gamma=0.7, iterations=1, train_all=False), backbone
    model = DeepLabV3Plus(backbone, args.num_classes, width=256, freeze_norm=False)
    for module in model.modules():  # with dropout the two ways would not have the same losses
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model, backbone


def losses_of(training: str, model: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """As in steps 1 and 5."""
    if training == "segmentation":
        summed = F.cross_entropy(model(images).float(), targets, ignore_index=IGNORE, reduction="sum")
        return {"loss": summed / (targets != IGNORE).sum().clamp_min(1)}
    step1 = train_classification.Constants()
    logits, maps = model(images)
    classification = F.multilabel_soft_margin_loss(logits.float(), targets)
    reconstruction = image_reconstruction_loss(maps, images, targets, step1.tiles)
    loss = classification + step1.ir_weight * reconstruction
    return {"loss": loss, "classification": classification, "reconstruction": reconstruction}


def recipe_of(training: str, args: Constants) -> Any:
    """The constants of the step."""
    script: Any = train_segmentation if training == "segmentation" else train_classification
    micro_batch, size = args.micro_batch, args.batch_sizes[training == "segmentation"]
    recipe = script.Constants(weights="none", batch_size=size, micro_batch=micro_batch, compile=args.compile)
    return replace(recipe, lr=1e-3, epochs=2, workers=0)


class Repeated(Dataset):
    """The patches of one batch, as often as there are steps; every batch holds all of them, in their order."""

    def __init__(self, images: Tensor, targets: Tensor, steps: int):
        self.images, self.targets, self.steps, self.reads = images, targets, steps, 0

    def __len__(self) -> int:
        return len(self.images) * self.steps

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        index = self.reads % len(self.images)
        self.reads += 1
        return self.images[index], self.targets[index]


def time_ours(training: str, size: int, args: Constants) -> tuple[float, list[float]]:
    """Seconds a step, and the loss of each step, by the loop of steps 1 and 5: the second of two epochs."""
    (model, backbone), recipe = model_of(training, args), recipe_of(training, args)
    losses: list[Tensor] = []
    accelerator = make_accelerator(args.precision)
    with tempfile.TemporaryDirectory() as folder:
        step = SimpleNamespace(args=recipe, accelerator=accelerator, path=Path(folder))
        patches: Any = Repeated(*batch_of(training, size, args), args.steps)
        with Training(step, model, patches, [backbone]) as course:

            def epoch() -> None:
                for images, targets in course.batches():
                    parts = losses_of(training, course.model, images, targets)
                    course.backward(**parts)
                    losses.append(parts["loss"].detach())

            for _ in course.epochs():
                _, seconds, _ = measured(epoch, 1, accelerator.device)
    return seconds / args.steps, [float(loss) for loss in losses]


def time_plain(training: str, size: int, args: Constants) -> tuple[float, list[float]]:
    """Seconds a step, and the loss of each step, as a simple script trains: the second of two epochs."""
    (model, backbone), recipe = model_of(training, args), recipe_of(training, args)
    losses: list[float] = []
    device = make_accelerator("fp32").device
    model.to(device).train()
    new = [module for module in model.children() if module is not backbone]
    groups = parameter_groups([backbone], new, recipe.lr, recipe.weight_decay)
    optimiser = torch.optim.SGD(groups, recipe.lr, recipe.momentum, nesterov=True)
    steps = 2 * args.steps

    def epoch() -> None:
        for images, targets in [batch_of(training, size, args)] * args.steps:
            for group in optimiser.param_groups:
                rate = group.setdefault("base", group["lr"])
                group["lr"] = rate * (1 - len(losses) / steps) ** 0.9
            optimiser.zero_grad()
            parts = losses_of(training, model, images.to(device), targets.to(device))
            parts["loss"].backward()
            optimiser.step()
            values = [value.item() for value in parts.values()]
            losses.append(values[0])

    epoch()
    _, seconds, _ = measured(epoch, 1, device)
    return seconds / args.steps, losses


def measure(training: str, ours: bool, size: int, args: Constants) -> tuple[float, float, list[float]]:
    """Seconds a step, peak memory in MB, the loss of each step."""
    device, way = "cuda" if torch.cuda.is_available() else "cpu", time_ours if ours else time_plain
    (seconds, losses), _, memory = measured(lambda: way(training, size, args), 1, device)
    return seconds, memory, losses


def load(size: int, args: Constants, folder: Path) -> dict[str, float]:
    """Images a second of one loading process, for each training."""
    random, ids = np.random.default_rng(0), [f"{index:03}" for index in range(args.load_patches)]
    files = sorted(path for path in args.images.iterdir() if path.is_file()) if args.images else []
    colours = random.integers(0, 256, (args.num_classes, 3)).astype(np.uint8)
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    for index, id in enumerate(ids):
        image, label = aerial_patch(random, size, args.num_classes)
        if files:
            image = np.array(Image.open(files[index % len(files)]).convert("RGB"))[:size, :size]
        Image.fromarray(image).save(folder / "images" / f"{id}.png")
        save_label(folder / "labels" / f"{id}.png", label[: image.shape[0], : image.shape[1]], colours)
    present = dict.fromkeys(ids, np.ones(args.num_classes, bool))
    targets: dict[str, dict[str, np.ndarray] | Path] = {"classification": present, "segmentation": folder / "labels"}
    rates = {}
    for training, target in targets.items():
        patches = TrainingPatches(ids, folder / "images", target, args.num_classes, size, 0)
        patches[0, 0]  # loads libraries: not a part of the cost
        _, seconds, _ = measured(lambda patches=patches: [patches[0, index] for index in range(len(ids))], 2)
        rates[training] = len(ids) / seconds
    return rates


def main(args: Constants) -> None:
    on_gpu = torch.cuda.is_available()
    sizes = args.sizes or ((128, 256, 512) if on_gpu else (128,))
    accelerator = make_accelerator(args.precision)
    precision = "bf16" if accelerator.mixed_precision == "bf16" else "fp32"
    print(f"{start_line(accelerator, precision)} of ours; {args.backbone}")
    rates = {}
    # a new process for each figure, so that the memory of one way does not count for the other
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for size in sizes:
            for training, count in zip(("classification", "segmentation"), args.batch_sizes, strict=True):
                plain, plain_memory, plain_losses = pool.apply(measure, (training, False, size, args))
                ours, memory, losses = pool.apply(measure, (training, True, size, args))
                rates[training, size] = count / ours
                apart = max(abs(a - b) / abs(b) for a, b in zip(losses, plain_losses, strict=True))
                print(
                    f"{training:14} {count:2} x {size} x {size}: plain {plain:.3f} s a step, {plain_memory:.0f} MB; "
                    f"ours {ours:.3f} s, {memory:.0f} MB; ratio {plain / ours:.2f}; {count / ours:.1f} images/s; "
                    f"losses of {len(losses)} steps within {apart:.2%}",
                    flush=True,
                )
    torch.set_num_threads(1)
    for size in args.load_sizes:
        with tempfile.TemporaryDirectory() as folder:
            for training, rate in load(size, args, Path(folder)).items():
                needed = rates.get((training, size))
                limit = f"; a step needs {needed:.1f}, {needed / rate:.2f} workers" if needed else ""
                print(f"loading for {training:14} at {size}: {rate:.0f} images/s a worker{limit}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Constants, description=__doc__))
