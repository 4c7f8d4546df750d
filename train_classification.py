"""Step 1: train the classifier whose class activation maps become pseudo-labels (method section 1).

Reads  datasets/<dataset>/train/images and image_labels.csv (no pixel label under the clean protocol)
Writes experiments/<dataset>/<experiment>/classifier/: model.pt, checkpoint.pt, log.jsonl, tensorboard, contact sheet

    python train_classification.py --dataset vaihingen
"""

import json
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbone import NAMES, Backbone
from models.classifier import Classifier
from models.ir_loss import image_reconstruction_loss
from models.prc import PixelRelationshipConstraint
from report.page import refresh
from tools.augment import TrainingPatches, to_tensor
from tools.cams import OUTPUT_STRIDE, fuse_scales, image_batches, mirrored_scales
from tools.command import UserError, check, run, stop
from tools.dataset import Dataset, load_dataset
from tools.labels import load_image, load_label
from tools.masks import load_masks
from tools.pictures import contact_sheet, heat, sample_ids
from tools.scores import ConfusionMatrix
from tools.step import ROOT, StepFolder, experiment_folder
from tools.training import check_recipe, load_checkpoint, make_accelerator, precision_of, train


@dataclass(frozen=True)
class Constants:
    dataset: str = "vaihingen"  # vaihingen | potsdam | isaid | demo | the name of your own dataset.toml
    experiment: str = "prc"  # results go to experiments/<dataset>/<experiment>/
    protocol: Literal["clean", "released"] = "clean"  # keeps the last epoch | released: the best on train PIXEL labels
    backbone: Literal[NAMES] = "resnet50"  # at output stride 16
    weights: str = "imagenet"  # imagenet (downloaded by torchvision) | the file of a state dict | none
    train_all: bool = False  # let the first stages learn as well; needed when weights is none
    gamma: float = 0.7  # PRC: affinities below this are cut, 0 to 0.999
    iterations: int = 1  # PRC: how often the affinity is applied; 0 switches PRC off
    ir_weight: float = 0.1  # weight lambda of the image reconstruction loss; 0 switches it off
    tiles: int = 4  # IR: parts with class colours of their own: 1, 4, 9, ...
    epochs: int = 20  # passes over the train split
    batch_size: int = 8  # over all processes together
    lr: float = 0.1  # of pretrained weights; their biases x2, new weights x10, new biases x20
    momentum: float = 1e-4  # what the released optimiser receives (0.9 was intended)
    weight_decay: float = 1e-4  # on weights only
    seed: int = 0  # of new weights, augmentation and order
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # bf16 where GPU or CPU (AMX) compute in it, else fp32
    compile: bool = False  # torch.compile the model: faster steps after minutes of preparation
    workers: int = 4  # processes that read and augment images
    samples: int = 8  # patches on the contact sheet
    root: Path = ROOT  # folder that holds datasets/ and experiments/
    overwrite: bool = False  # start anew where the folder holds results of other constants


def compute_loss(model: nn.Module, images: Tensor, labels: Tensor, constants: Constants) -> dict[str, Tensor]:
    """Multi-label soft margin on the raw maps' means + lambda x image reconstruction by the PRC maps."""
    logits, maps = model(images)
    classification = F.multilabel_soft_margin_loss(logits.float(), labels)
    reconstruction = image_reconstruction_loss(maps, images, labels, constants.tiles)
    loss = classification + constants.ir_weight * reconstruction
    return {"loss": loss, "classification": classification, "reconstruction": reconstruction}


def argmax_miou(model: nn.Module, dataset: Dataset, constants: Constants, device: torch.device) -> float:
    """The released protocol's choice of the epoch: mIoU of one-scale argmax CAMs on the train split's PIXEL labels."""
    model.eval()
    matrix, present = ConfusionMatrix(dataset.num_classes), dataset.image_labels("train")

    for ids, images in image_batches(dataset.images("train"), dataset.ids("train"), 8, constants.workers, stop):
        maps = mirrored_scales(lambda x: model(x)[1].relu(), images, [1.0], device)[0]
        for id, map in zip(ids, maps[: len(ids)].cpu(), strict=True):
            classes = np.flatnonzero(present[id])
            prediction = classes[fuse_scales([map[classes]], images.shape[-2:]).argmax(0).numpy()]
            matrix.update(
                load_label(dataset.labels("train") / f"{id}.png", dataset.num_classes), prediction.astype(np.uint8)
            )
    return matrix.scores()["miou"]


def check_constants(constants: Constants, dataset: Dataset) -> None:
    """Raise `UserError` for constants that cannot work with this data set, before anything is made."""
    check_recipe(constants, len(dataset.ids("train")))
    check(0 <= constants.ir_weight < float("inf"), f"ir_weight is {constants.ir_weight}, but it must be 0 or more")
    check(
        constants.weights != "none" or constants.train_all,
        "weights is none, so the first stages would stay random for ever: add --train-all, or give weights",
    )
    side = -(-dataset.patch_size // OUTPUT_STRIDE)
    try:
        PixelRelationshipConstraint(1, constants.gamma, constants.iterations)
        image_reconstruction_loss(
            torch.zeros(1, 1, side, side), torch.zeros(1, 3, 8, 8), torch.zeros(1, 1), constants.tiles
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def main(constants: Constants) -> None:
    dataset = load_dataset(constants.dataset, constants.root)
    labels = dataset.image_labels("train")
    ids = sorted(labels)
    check_constants(constants, dataset)
    accelerator = make_accelerator(constants.precision)
    constants = replace(constants, precision=precision_of(accelerator))
    torch.manual_seed(constants.seed)
    try:
        model = Classifier(
            Backbone(constants.backbone, constants.weights),
            dataset.num_classes,
            constants.gamma,
            constants.iterations,
            constants.train_all,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    if constants.weights == "none":
        model.pretrained, model.new = [], [model]
    folder = StepFolder(
        experiment_folder(constants.root, constants.dataset, constants.experiment) / "classifier",
        constants,
        # told by all that rests on it, also in other experiments that take this classifier
        notes={"protocol_of_the_steps": "released"} if constants.protocol == "released" else None,
        device=accelerator.device,
        state=accelerator,
    )
    patches = TrainingPatches(
        ids, dataset.images("train"), labels, dataset.num_classes, dataset.patch_size, constants.seed
    )
    select = partial(argmax_miou, dataset=dataset, constants=constants, device=accelerator.device)
    train(
        model,
        patches,
        partial(compute_loss, constants=constants),
        constants,
        folder,
        accelerator,
        select if constants.protocol == "released" else None,
    )

    if accelerator.is_main_process:
        warn_of_guessing(folder.folder / "log.jsonl")
        load_checkpoint(folder.folder / "model.pt", model)
        draw_sheet(
            folder.folder / "contact_sheet.png", model.eval(), dataset, labels, sample_ids(ids, constants.samples)
        )
    folder.close(".pt")
    refresh(folder, dataset, load_masks)


def warn_of_guessing(log: Path) -> None:
    """A classifier that has learnt nothing gives maps that look like maps, and a segmenter that looks trained."""
    loss = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])["classification"]
    if loss >= math.log(2):
        print(
            f"warning: the classification loss ended at {loss:.2f}, and guessing gives {math.log(2):.2f}: the class "
            "activation maps will be worthless; try a lower lr, with --weights none also --momentum 0.9, or more epochs"
        )


def draw_sheet(path: Path, model: nn.Module, dataset: Dataset, labels: dict[str, np.ndarray], ids: list[str]) -> None:
    """Each sampled patch with the single-scale CAMs of its classes."""
    device, rows = next(model.parameters()).device, []
    for id in ids:
        image = load_image(dataset.images("train") / f"{id}.png")
        maps = mirrored_scales(lambda x: model(x)[1].relu(), to_tensor(image)[None], [1.0], device)
        classes = np.flatnonzero(labels[id])
        fused = fuse_scales([maps[0][0, classes]], image.shape[:2]).cpu().numpy()
        by_class = dict(zip(classes, fused, strict=True))
        rows.append([image, *(heat(image, by_class[k]) if k in by_class else None for k in range(dataset.num_classes))])
    contact_sheet(path, rows, ["image", *dataset.classes])


if __name__ == "__main__":
    run(main, Constants, __doc__)
