"""Step 1: train the classifier whose class activation maps become pseudo-labels (method section 1).

Reads  datasets/<dataset>/train/images and image_labels.csv (no pixel label under the clean protocol)
Writes experiments/<dataset>/<experiment>/classifier/: model.pt, checkpoint.pt, log.jsonl, tensorboard, contact sheet

    python train_classification.py --dataset vaihingen
"""

from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbone import BackboneName
from models.classifier import Classifier
from models.ir_loss import check_tiles, image_reconstruction_loss
from report.page import renew
from tools.augment import TrainingPatches, to_tensor
from tools.cams import OUTPUT_STRIDE, fuse_scales, mirrored_scales
from tools.command import UserError, check, run
from tools.constants import (
    Affinity,
    Count,
    Machine,
    MayChange,
    Momentum,
    NonNegative,
    Positive,
    PositiveCount,
    Seed,
    checked_constants,
)
from tools.dataset import Dataset
from tools.devices import make_accelerator, precision_of
from tools.labels import load_image
from tools.logs import read_log
from tools.pictures import heat
from tools.result_checks import check_classifier, patch_shares
from tools.selection import cam_miou
from tools.step import Step
from tools.training import ClassScores, Training, advise, check_recipe, load_backbone, load_checkpoint, train


@checked_constants
class Constants(Machine):
    dataset: str = "vaihingen"  # vaihingen | potsdam | isaid | demo | the name of your own dataset.toml
    experiment: str = "prc"  # results go to experiments/<dataset>/<experiment>/
    protocol: Literal["clean", "released"] = "clean"  # keeps the last epoch | released: the best on train PIXEL labels
    backbone: BackboneName = "resnet50"  # at output stride 16
    weights: str = "imagenet"  # imagenet (downloaded by torchvision) | the file of a state dict | none
    train_all: bool = False  # let the first stages learn as well; needed when weights is none
    gamma: Affinity | None = None  # PRC: affinities below this are cut, 0 to 0.999; None: the data set's, else 0.7
    iterations: Count = 1  # PRC: how often the affinity is applied; 0 switches PRC off
    ir_weight: NonNegative = 0.1  # weight lambda of the image reconstruction loss; 0 switches it off
    tiles: PositiveCount = 4  # IR: parts with class colours of their own: 1, 4, 9, ...
    epochs: PositiveCount = 20  # passes over the train split
    batch_size: PositiveCount = 8  # over all processes together
    micro_batch: Count = 0  # patches computed at once; 0: all, halved when the memory is full. Changes BatchNorm
    lr: Positive = 0.1  # of pretrained weights; their biases x2, new weights x10, new biases x20
    momentum: Momentum = 1e-4  # what the released optimiser receives (0.9 was intended)
    weight_decay: NonNegative = 1e-4  # on weights only
    seed: Seed = 0  # of new weights, augmentation and order
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # bf16 where GPU or CPU compute in it, else fp32
    compile: MayChange[bool] = False  # torch.compile the model: faster steps after minutes of preparation


def compute_loss(
    model: nn.Module, images: Tensor, labels: Tensor, ir_weight: float, tiles: int, scores: ClassScores | None = None
) -> dict[str, Tensor]:
    """Multi-label soft margin on the means of the raw maps + lambda x image reconstruction by the PRC maps."""
    logits, maps = model(images)
    if scores:
        scores.add(logits, labels)
    classification = F.multilabel_soft_margin_loss(logits.float(), labels)
    reconstruction = image_reconstruction_loss(maps, images, labels, tiles)
    loss = classification + ir_weight * reconstruction
    return {"loss": loss, "classification": classification, "reconstruction": reconstruction}


def check_constants(args: Constants, dataset: Dataset) -> None:
    """Raise `UserError` for constants that cannot work with this data set, before anything is made."""
    check_recipe(args, len(dataset.ids("train")))
    check(
        args.weights != "none" or args.train_all,
        "weights is none, so the first stages would stay random: add --train-all, or give weights",
    )
    side = -(-dataset.patch_size // OUTPUT_STRIDE)
    try:
        check_tiles(args.tiles, (side, side))
    except ValueError as error:
        raise UserError(str(error)) from None


def main(args: Constants) -> None:
    step = Step("classifier", args, image_labels=True)
    dataset, labels = step.dataset, step.labels
    check_constants(args, dataset)
    accelerator = make_accelerator(args.precision, args.device)
    step.announce(accelerator, precision_of(accelerator))  # before weights are downloaded
    if advice := advise(args, Constants(), len(step.ids)):
        accelerator.print(advice)
    torch.manual_seed(args.seed)
    backbone = load_backbone(args.backbone, args.weights)
    model = Classifier(
        backbone, dataset.num_classes, step.method_value("gamma", "gamma"), args.iterations, args.train_all
    )
    patches = TrainingPatches(
        step.ids, dataset.images("train"), labels, dataset.num_classes, dataset.patch_size, args.seed
    )
    scores = ClassScores(dataset.classes, accelerator)
    compute = partial(compute_loss, ir_weight=args.ir_weight, tiles=args.tiles, scores=scores)
    pretrained = [] if args.weights == "none" else [backbone]
    training = Training(model, pretrained, patches, compute, args, accelerator, seen=scores.seen)
    released = args.protocol == "released"
    select = partial(cam_miou, dataset=dataset, args=args, device=accelerator.device)

    def row(id: str) -> list[np.ndarray | None]:
        """The patch with the single-scale CAMs of its classes."""
        image, classes = load_image(dataset.images("train") / f"{id}.png"), np.flatnonzero(labels[id])
        maps = mirrored_scales(lambda x: model(x)[1].relu(), [to_tensor(image)[None]], accelerator.device)
        fused = fuse_scales([maps[0][0, classes]], image.shape[:2]).cpu().numpy()
        by_class = dict(zip(classes, fused, strict=True))
        return [image, *(heat(image, by_class[k]) if k in by_class else None for k in range(dataset.num_classes))]

    with step.output(
        ".pt",
        state=accelerator,
        notes={"protocol_of_the_steps": "released"} if released else {},
        settings={"precision": precision_of(accelerator)},
    ):
        train(training, step.path, select if released else None, scores.average_precision)
        step.warn(check_classifier(read_log(step.path / "log.jsonl"), patch_shares(labels, dataset.classes)))
        load_checkpoint(step.path / "model.pt", model)
        model.eval()
        step.draw(row, ["image", *dataset.classes], legend=False)


if __name__ == "__main__":
    run(main, Constants, __doc__, then=renew)
