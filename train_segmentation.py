"""Step 5: train DeepLabv3+ on the refined pseudo-labels (method section 5).

Reads  datasets/<dataset>/train/images and experiments/<dataset>/<experiment>/refined_pseudo_labels
Writes experiments/<dataset>/<experiment>/segmenter/: model.pt, checkpoint.pt, log.jsonl, tensorboard, contact sheet

    python train_segmentation.py --dataset vaihingen

The fully supervised bound: the same training on pixel truth, in an experiment of its own.

    python train_segmentation.py --dataset vaihingen --experiment supervised --labels truth
"""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F

from inference_segmentation import summed_logits
from models.backbone import BackboneName
from models.deeplab import DeepLabV3Plus
from report.page import renew
from tools.augment import TrainingPatches, to_tensor
from tools.command import and_more, check, run
from tools.constants import (
    Count,
    Machine,
    MayChange,
    Momentum,
    NonNegative,
    Positive,
    PositiveCount,
    Seed,
    Width,
    checked_constants,
)
from tools.dataset import Dataset
from tools.labels import IGNORE
from tools.logs import read_log
from tools.result_checks import check_losses
from tools.selection import segmentation_miou
from tools.step import Step
from tools.training import Training, check_recipe, load_backbone, load_checkpoint


@checked_constants
class Constants(Machine):  # and root, overwrite, workers, samples, device
    dataset: str = "vaihingen"  # vaihingen | potsdam | isaid | demo | the name of your own dataset.toml
    experiment: str = "prc"  # results go to experiments/<dataset>/<experiment>/
    protocol: Literal["clean", "released"] = "clean"  # keeps the last epoch | released: the best on train PIXEL labels
    labels: str = "refined_pseudo_labels"  # the step folder to learn from | truth (the fully supervised bound)
    backbone: BackboneName = "resnet50"  # at output stride 16
    weights: str = "imagenet"  # imagenet (downloaded by torchvision) | the file of a state dict | none
    freeze_norm: bool = True  # keep the backbone's BatchNorm statistics; must be False when weights is none
    width: Width = 256  # channels of ASPP and decoder, a multiple of 4
    epochs: PositiveCount = 50  # passes over the train split
    batch_size: PositiveCount = 16  # over all processes together
    micro_batch: MayChange[Count] = 0  # patches computed at once; 0: the whole batch. Results stay equal
    lr: Positive = 0.007  # of pretrained weights; their biases x2, new weights x10, new biases x20
    momentum: Momentum = 4e-5  # the released code passes its weight decay here; 0.9 was intended
    weight_decay: NonNegative = 4e-5  # on weights only
    seed: Seed = 0  # of new weights, augmentation and order
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # bf16 where GPU or CPU compute in it, else fp32
    compile: MayChange[bool] = False  # torch.compile the model: faster steps after minutes of preparation


def check_constants(args: Constants, dataset: Dataset) -> None:
    """Raise `UserError` for constants that cannot work with this data set, before anything is made."""
    check_recipe(args, len(dataset.ids("train")))
    check(
        args.weights != "none" or not args.freeze_norm,
        "weights is none, so there are no BatchNorm statistics to keep: add --no-freeze-norm, or give weights",
    )


def check_labels(folder: Path, ids: list[str]) -> None:
    """Raise `UserError` for train patches without a label map."""
    missing = [id for id in ids if not (folder / f"{id}.png").exists()]
    check(not missing, f"{folder} has no label of {len(missing)} train images: {and_more(missing, 3, ', ')}")


def main(args: Constants) -> None:
    truth = args.labels == "truth"
    check(
        args.labels.replace("_", "").isalnum(),
        f'labels is "{args.labels}", but it must be the name of a step folder, or truth',
    )
    step = Step("segmenter", args, reads=[] if truth else [args.labels])
    dataset = step.dataset
    check_constants(args, dataset)
    label_folder = dataset.labels("train") if truth else step.reads[args.labels]
    check_labels(label_folder, step.ids)
    torch.manual_seed(args.seed)
    backbone = load_backbone(args.backbone, args.weights)
    model = DeepLabV3Plus(backbone, dataset.num_classes, args.width, args.freeze_norm)
    pretrained = [] if args.weights == "none" else [backbone]
    patches = TrainingPatches(
        step.ids, dataset.images("train"), label_folder, dataset.num_classes, dataset.patch_size, args.seed
    )
    training = Training(step, model, patches, pretrained)
    if truth:
        step.notes["supervision"] = "pixel truth of the train split"
    if args.protocol == "released":
        step.notes["protocol_of_the_steps"] = "released"

    def predict(image: np.ndarray) -> np.ndarray:
        """The label map of a patch at scale 1 with its mirror image, for the contact sheet."""
        (logits,) = summed_logits(model, [to_tensor(image)[None]], image.shape[:2], step.device)
        return logits[0].argmax(0).byte().cpu().numpy()

    with step.output(".pt"), training:  # a stopped training continues after its last finished epoch
        for _ in training.epochs():
            for images, labels in training.batches():
                logits = training.model(images)
                summed = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum")
                labelled = (labels != IGNORE).sum().clamp_min(1)  # so that a batch without any gives 0, not NaN
                training.backward(summed / labelled)
            if args.protocol == "released":
                training.keep_best(train_miou=segmentation_miou(model, step))

        step.warn(check_losses(read_log(training.log_file)))
        load_checkpoint(step.path / "model.pt", model)
        model.eval()
        step.draw_labels({"learnt from": label_folder, "segmenter": predict})


if __name__ == "__main__":
    run(main, Constants, __doc__, then=renew)
