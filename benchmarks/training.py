"""A training step our way and the plain way, for both trainings; and loading alone, to show which of them is the limit.

Plain: NCHW, float32, every loss read by .item() in every step. Ours: what tools/training.py does; channels_last, bf16
where the device has it, losses summed on the device, one fused optimiser. Both start from the same weights and see the
same batches; random weights cost what pretrained ones do. Each way runs in a process of its own, whose growth or, on a
GPU, allocations are the memory. Loading is read + resize + crop + normalise in one process, as in a worker.

Command: OMP_NUM_THREADS=1 python benchmarks/training.py, or with --images FOLDER on real images
"""

import multiprocessing
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from measure import aerial_patch, measured
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_classification
import train_segmentation
from models.backbone import Backbone
from models.classifier import Classifier
from models.deeplab import DeepLabV3Plus
from tools.augment import TrainingPatches
from tools.labels import save_label
from tools.training import make_accelerator, parameter_groups


@dataclass(frozen=True)
class Constants:
    sizes: tuple[int, ...] | None = None  # pixels a side; None: 128 on a CPU, and 128, 256 and 512 on a GPU
    backbone: str = "resnet50"
    num_classes: int = 6
    batch_sizes: tuple[int, int] = (8, 16)  # of classification and segmentation: the paper's
    steps: int = 2  # timed, after one that is not
    compile: bool = False  # ours with torch.compile
    load_sizes: tuple[int, ...] = (128, 256, 512)
    load_patches: int = 24  # of each size; read twice, the faster time counts
    images: Path | None = None  # a folder of RGB images to cut them from; None: blobs with texture


def batches(training: str, size: int, count: int, constants: Constants) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    images = torch.randn(count, 3, size, size)
    if training == "classification":
        return [(images, (torch.rand(count, constants.num_classes) < 0.5).float())] * (constants.steps + 1)
    return [(images, torch.randint(0, constants.num_classes, (count, size, size)))] * (constants.steps + 1)


def time_steps(training: str, way: str, size: int, constants: Constants) -> tuple[float, list[float]]:
    """Seconds a step, the loss of each step."""
    torch.manual_seed(0)
    backbone = Backbone(constants.backbone, "none")
    if training == "classification":
        model = Classifier(backbone, constants.num_classes)
        settings = train_classification.Constants(weights="none")

        def compute_loss(*arguments):
            return train_classification.compute_loss(*arguments, settings)

    else:
        model = DeepLabV3Plus(backbone, constants.num_classes, freeze_norm=False)
        settings, compute_loss = train_segmentation.Constants(weights="none"), train_segmentation.compute_loss
    for module in model.modules():  # with dropout no two ways would see the same losses
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ours = way == "ours"
    accelerator = make_accelerator("auto" if ours else "fp32")
    device, losses = accelerator.device, []
    model = model.to(device, memory_format=torch.channels_last if ours else torch.contiguous_format).train()
    groups = parameter_groups(model, 1e-3, settings.weight_decay)
    optimiser = torch.optim.SGD(groups, 1e-3, settings.momentum, nesterov=True, fused=ours or None)
    if ours and constants.compile:
        model.compile()
    model, optimiser = accelerator.prepare(model, optimiser)

    def step(images: torch.Tensor, targets: torch.Tensor) -> None:
        layout = torch.channels_last if ours else torch.contiguous_format
        images, targets = images.to(device, memory_format=layout), targets.to(device)
        with accelerator.autocast():
            found = compute_loss(model, images, targets)
        optimiser.zero_grad()
        accelerator.backward(found["loss"])
        optimiser.step()
        parts = {name: value.detach() for name, value in found.items()}
        losses.append(parts["loss"] if ours else next(iter([value.item() for value in parts.values()])))

    first, *rest = batches(training, size, constants.batch_sizes[training == "segmentation"], constants)

    step(*first)
    _, seconds, _ = measured(lambda: [step(*batch) for batch in rest], 1, device)
    return seconds / constants.steps, [float(loss) for loss in losses]


def measure(*arguments) -> tuple[float, float, list[float]]:
    """Seconds a step, peak memory in MB, the loss of each step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    (seconds, losses), _, memory = measured(lambda: time_steps(*arguments), 1, device)
    return seconds, memory, losses


def load(size: int, constants: Constants, folder: Path) -> dict[str, float]:
    """Images a second of one loading process, for each training."""
    random, ids, rates = np.random.default_rng(0), [f"{index:03}" for index in range(constants.load_patches)], {}
    files = sorted(path for path in constants.images.iterdir() if path.is_file()) if constants.images else []
    colours = random.integers(0, 256, (constants.num_classes, 3)).astype(np.uint8)
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    for index, id in enumerate(ids):
        image, label = aerial_patch(random, size, constants.num_classes)
        if files:
            image = np.array(Image.open(files[index % len(files)]).convert("RGB"))[:size, :size]
        Image.fromarray(image).save(folder / "images" / f"{id}.png")
        save_label(folder / "labels" / f"{id}.png", label[: image.shape[0], : image.shape[1]], colours)
    targets = {"classification": dict.fromkeys(ids, np.ones(constants.num_classes, bool))}
    for training, target in (targets | {"segmentation": folder / "labels"}).items():
        patches = TrainingPatches(ids, folder / "images", target, constants.num_classes, size, 0)
        patches[0, 0]  # what a first one loads is no part of the cost
        _, seconds, _ = measured(lambda patches=patches: [patches[0, index] for index in range(len(ids))], 2)
        rates[training] = len(ids) / seconds
    return rates


def main(constants: Constants) -> None:
    on_gpu = torch.cuda.is_available()
    sizes = constants.sizes or ((128, 256, 512) if on_gpu else (128,))
    device = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    precision = make_accelerator().mixed_precision
    print(f"{device}; {constants.backbone}; ours in {'fp32' if precision == 'no' else precision}")
    rates = {}
    # a new process for each figure, so that one way's memory does not count for the other
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for size in sizes:
            for training, count in zip(("classification", "segmentation"), constants.batch_sizes, strict=True):
                found = {way: pool.apply(measure, (training, way, size, constants)) for way in ("plain", "ours")}
                (plain, plain_memory, plain_losses), (ours, memory, losses) = found["plain"], found["ours"]
                rates[training, size] = count / ours
                apart = max(abs(a - b) / abs(b) for a, b in zip(losses, plain_losses, strict=True))
                print(
                    f"{training:14} {count:2} x {size} x {size}: plain {plain:.3f} s a step, {plain_memory:.0f} MB; "
                    f"ours {ours:.3f} s, {memory:.0f} MB; ratio {plain / ours:.2f}; {count / ours:.1f} images/s; "
                    f"losses of {len(losses)} steps within {apart:.2%}",
                    flush=True,
                )
    torch.set_num_threads(1)
    for size in constants.load_sizes:
        with tempfile.TemporaryDirectory() as folder:
            for training, rate in load(size, constants, Path(folder)).items():
                needed = rates.get((training, size))
                limit = f"; the step needs {needed:.1f}, that is {needed / rate:.2f} workers" if needed else ""
                print(f"loading for {training:14} at {size}: {rate:.0f} images/s a worker{limit}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Constants, description=__doc__))
