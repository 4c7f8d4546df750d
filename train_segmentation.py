"""Step 5: train DeepLabv3+ on the refined pseudo-labels (method section 5).

Reads  datasets/<dataset>/train/images and experiments/<dataset>/<experiment>/refined_pseudo_labels
Writes experiments/<dataset>/<experiment>/segmenter/: model.pt, checkpoint.pt, log.jsonl, tensorboard, contact sheet

    python train_segmentation.py --dataset vaihingen

The fully supervised bound: the same training on pixel truth, in an experiment of its own.

    python train_segmentation.py --dataset vaihingen --experiment supervised --labels truth
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbone import NAMES, Backbone
from models.deeplab import DeepLabV3Plus
from report.page import refresh
from tools.augment import TrainingPatches, to_tensor
from tools.cams import image_batches, mirrored_scales
from tools.command import UserError, check, run, stop
from tools.dataset import Dataset, load_dataset
from tools.labels import IGNORE, load_image, load_label
from tools.masks import load_masks
from tools.pictures import colourise, contact_sheet, sample_ids
from tools.scores import ConfusionMatrix
from tools.step import ROOT, StepFolder, experiment_folder, require
from tools.training import check_recipe, load_checkpoint, make_accelerator, precision_of, train


@dataclass(frozen=True)
class Constants:
    dataset: str = "vaihingen"  # vaihingen | potsdam | isaid | demo | the name of your own dataset.toml
    experiment: str = "prc"  # results go to experiments/<dataset>/<experiment>/
    protocol: Literal["clean", "released"] = "clean"  # keeps the last epoch | released: the best on train PIXEL labels
    labels: str = "refined_pseudo_labels"  # the step folder to learn from | truth (the fully supervised bound)
    backbone: Literal[NAMES] = "resnet50"  # at output stride 16
    weights: str = "imagenet"  # imagenet (downloaded by torchvision) | the file of a state dict | none
    freeze_norm: bool = True  # keep the backbone's BatchNorm statistics; must be False when weights is none
    width: int = 256  # channels of ASPP and decoder
    epochs: int = 50  # passes over the train split
    batch_size: int = 16  # over all processes together
    lr: float = 0.007  # of pretrained weights; their biases x2, new weights x10, new biases x20
    momentum: float = 1e-4  # what the released optimiser receives (0.9 was intended)
    weight_decay: float = 4e-5  # on weights only
    seed: int = 0  # of new weights, augmentation and order
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # bf16 where GPU or CPU (AMX) compute in it, else fp32
    compile: bool = False  # torch.compile the model: faster steps after minutes of preparation
    workers: int = 4  # processes that read and augment images
    samples: int = 8  # patches on the contact sheet
    root: Path = ROOT  # folder that holds datasets/ and experiments/
    overwrite: bool = False  # start anew where the folder holds results of other constants


def compute_loss(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Cross-entropy over all labelled pixels of a batch, in all processes; 0 where every pixel is ignored."""
    summed = F.cross_entropy(model(images).float(), labels, ignore_index=IGNORE, reduction="sum")
    labelled = (labels != IGNORE).sum()
    if torch.distributed.is_initialized():  # gradients will be averaged, but the parts differ in labelled pixels
        labelled = reduce(labelled.float(), "mean")
    return {"loss": summed / labelled.clamp_min(1)}


def train_miou(model: nn.Module, dataset: Dataset, constants: Constants, device: torch.device) -> float:
    """The released protocol's choice of the epoch: single-scale mIoU on the train split's PIXEL labels."""
    model.eval()
    matrix = ConfusionMatrix(dataset.num_classes)

    for ids, images in image_batches(dataset.images("train"), dataset.ids("train"), 8, constants.workers, stop):
        predictions = mirrored_scales(model, images, [1.0], device)[0].argmax(1).byte().cpu().numpy()
        for id, prediction in zip(ids, predictions[: len(ids)], strict=True):
            matrix.update(load_label(dataset.labels("train") / f"{id}.png", dataset.num_classes), prediction)
    return matrix.scores()["miou"]


def check_constants(constants: Constants, dataset: Dataset) -> None:
    """Raise `UserError` for constants that cannot work with this data set, before anything is made."""
    check_recipe(constants, len(dataset.ids("train")))
    check(
        constants.width > 0 and constants.width % 4 == 0, f"width is {constants.width}, but it must be a multiple of 4"
    )
    check(
        constants.weights != "none" or not constants.freeze_norm,
        "weights is none, so there are no BatchNorm statistics to keep: add --no-freeze-norm, or give weights",
    )
    check(
        constants.labels.replace("_", "").isalnum(),
        f'labels is "{constants.labels}", but it must be the name of a step folder, or truth',
    )


def main(constants: Constants) -> None:
    dataset = load_dataset(constants.dataset, constants.root)
    experiment = experiment_folder(constants.root, constants.dataset, constants.experiment)
    check_constants(constants, dataset)
    truth = constants.labels == "truth"
    source = dataset.labels("train") if truth else experiment / constants.labels
    inputs = {} if truth else {constants.labels: require(source)}
    ids = dataset.ids("train")
    missing = [id for id in ids if not (source / f"{id}.png").exists()]
    check(
        not missing, f"{source} lacks the label of {len(missing)} train images, {missing[0] if missing else ''} for one"
    )
    accelerator = make_accelerator(constants.precision)
    constants = replace(constants, precision=precision_of(accelerator))
    torch.manual_seed(constants.seed)
    try:
        backbone = Backbone(constants.backbone, constants.weights)
    except ValueError as error:
        raise UserError(str(error)) from None
    model = DeepLabV3Plus(backbone, dataset.num_classes, constants.width, constants.freeze_norm)
    if constants.weights == "none":
        model.pretrained, model.new = [], [model]
    notes = {"supervision": "pixel truth of the train split"} if truth else {}
    if constants.protocol == "released":
        notes["protocol_of_the_steps"] = "released"
    folder = StepFolder(
        experiment / "segmenter",
        constants,
        inputs,
        notes,
        device=accelerator.device,
        state=accelerator,
    )
    patches = TrainingPatches(
        ids, dataset.images("train"), source, dataset.num_classes, dataset.patch_size, constants.seed
    )
    select = partial(train_miou, dataset=dataset, constants=constants, device=accelerator.device)
    train(
        model,
        patches,
        compute_loss,
        constants,
        folder,
        accelerator,
        select if constants.protocol == "released" else None,
    )

    if accelerator.is_main_process:
        load_checkpoint(folder.folder / "model.pt", model)
        model.eval()
        rows = []
        for id in sample_ids(ids, constants.samples):
            image = load_image(dataset.images("train") / f"{id}.png")
            logits = mirrored_scales(model, to_tensor(image)[None], [1.0], accelerator.device)[0]
            label = load_label(source / f"{id}.png", dataset.num_classes)
            prediction = logits[0].argmax(0).byte().cpu().numpy()
            rows.append([image, colourise(label, dataset.colours), colourise(prediction, dataset.colours)])
        contact_sheet(
            folder.folder / "contact_sheet.png",
            rows,
            ["image", "learnt from", "segmenter"],
            zip(dataset.classes, dataset.colours, strict=True),
        )
    folder.close(".pt")
    refresh(folder, dataset, load_masks)


if __name__ == "__main__":
    run(main, Constants, __doc__)
