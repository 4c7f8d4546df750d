"""Step 1: train the classifier whose class activation maps become pseudo-labels (method section 1).

Reads  datasets/<dataset>/train/images and image_labels.csv (no pixel label under the clean protocol)
Writes experiments/<dataset>/<experiment>/classifier/: model.pt, checkpoint.pt, log.jsonl, tensorboard, contact sheet

    python train_classification.py --dataset vaihingen
"""

from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F

from infer_classification import class_maps
from models.backbone import BackboneName
from models.classifier import Classifier
from models.ir_loss import check_tiles, image_reconstruction_loss
from report.page import renew
from tools.augment import TrainingPatches, to_tensor
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
from tools.logs import read_log
from tools.map_files import OUTPUT_STRIDE, fuse_scales, relative
from tools.result_checks import check_classifier, patch_shares
from tools.selection import cam_miou
from tools.step import Step
from tools.training import ClassScores, Training, advise, check_recipe, load_backbone, load_checkpoint


@checked_constants
class Constants(Machine):  # and root, overwrite, workers, samples, device
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
    micro_batch: Count = 0  # patches computed at once; 0: the whole batch. Changes BatchNorm's statistics
    lr: Positive = 0.1  # of pretrained weights; their biases x2, new weights x10, new biases x20
    momentum: Momentum = 1e-4  # the released code passes its weight decay here; 0.9 was intended
    weight_decay: NonNegative = 1e-4  # on weights only
    seed: Seed = 0  # of new weights, augmentation and order
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # bf16 where GPU or CPU compute in it, else fp32
    compile: MayChange[bool] = False  # torch.compile the model: faster steps after minutes of preparation


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
    dataset, image_labels = step.dataset, step.image_labels
    check_constants(args, dataset)
    if step.is_main:
        advise(args, len(step.ids))
    torch.manual_seed(args.seed)
    backbone = load_backbone(args.backbone, args.weights)
    gamma = step.method_value("gamma")
    model = Classifier(backbone, dataset.num_classes, gamma, args.iterations, args.train_all)
    pretrained = [] if args.weights == "none" else [backbone]
    patches = TrainingPatches(
        step.ids, dataset.images("train"), image_labels, dataset.num_classes, dataset.patch_size, args.seed
    )
    scores = ClassScores(dataset.classes, step.accelerator)
    if args.protocol == "released":
        step.notes["protocol_of_the_steps"] = "released"

    def maps_of(id: str, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The maps of the patch's classes at scale 1 with its mirror image, for the contact sheet."""
        _, maps = class_maps(model, [to_tensor(image)[None]], step.device)
        classes = np.flatnonzero(image_labels[id])
        return classes, relative(fuse_scales([maps[0, classes].cpu().numpy()], image.shape[:2]))

    training = Training(step, model, patches, pretrained)
    with step.output(".pt"), training:  # a stopped training continues after its last finished epoch
        for _ in training.epochs():
            for images, labels in training.batches():
                # the logits are means of the maps before PRC, so only the reconstruction trains PRC
                logits, maps = training.model(images)
                classification = F.multilabel_soft_margin_loss(logits.float(), labels)
                reconstruction = image_reconstruction_loss(maps, images, labels, args.tiles)
                loss = classification + args.ir_weight * reconstruction
                training.backward(loss, classification=classification, reconstruction=reconstruction)
                scores.add(logits, labels)
            training.log(average_precision=scores.average_precision())
            if args.protocol == "released":
                training.keep_best(train_miou=cam_miou(model, step))

        step.warn(check_classifier(read_log(training.log_file), patch_shares(image_labels, dataset.classes)))
        load_checkpoint(step.path / "model.pt", model)
        model.eval()
        step.draw_maps(maps_of)


if __name__ == "__main__":
    run(main, Constants, __doc__, then=renew)
