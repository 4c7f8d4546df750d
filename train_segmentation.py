"""Step 5: train DeepLabv3+ on the refined pseudo-labels (method section 5).

Reads  datasets/<dataset>/train/images and experiments/<dataset>/<experiment>/refined_pseudo_labels
Writes experiments/<dataset>/<experiment>/segmenter/: model.pt, checkpoint.pt, log.jsonl, tensorboard, contact sheet

    python train_segmentation.py --dataset vaihingen

The fully supervised bound: the same training on pixel truth, in an experiment of its own.

    python train_segmentation.py --dataset vaihingen --experiment supervised --labels truth
"""

from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbone import BackboneName
from models.deeplab import DeepLabV3Plus
from report.page import renew
from tools.augment import TrainingPatches, to_tensor
from tools.cams import mirrored_scales
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
from tools.devices import make_accelerator, precision_of
from tools.labels import IGNORE, load_image, load_label
from tools.logs import read_log
from tools.pictures import colourise
from tools.result_checks import check_losses
from tools.selection import segmentation_miou
from tools.step import Step
from tools.training import Training, check_recipe, load_backbone, load_checkpoint, train


@checked_constants
class Constants(Machine):
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
    micro_batch: MayChange[Count] = 0  # patches computed at once; 0: the whole batch, halved when the memory is full
    lr: Positive = 0.007  # of pretrained weights; their biases x2, new weights x10, new biases x20
    momentum: Momentum = 4e-5  # what the released optimiser receives (0.9 was intended)
    weight_decay: NonNegative = 4e-5  # on weights only
    seed: Seed = 0  # of new weights, augmentation and order
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # bf16 where GPU or CPU compute in it, else fp32
    compile: MayChange[bool] = False  # torch.compile the model: faster steps after minutes of preparation


def compute_loss(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Mean cross-entropy of the labelled pixels; 0 where every pixel is ignored."""
    summed = F.cross_entropy(model(images).float(), labels, ignore_index=IGNORE, reduction="sum")
    return {"loss": summed / labelled_pixels(labels).clamp_min(1)}


def labelled_pixels(labels: Tensor) -> Tensor:
    """The number of labelled pixels, which weights the micro-batches of a batch."""
    return (labels != IGNORE).sum()


def check_constants(args: Constants, dataset: Dataset) -> None:
    """Raise `UserError` for constants that cannot work with this data set, before anything is made."""
    check_recipe(args, len(dataset.ids("train")))
    check(
        args.weights != "none" or not args.freeze_norm,
        "weights is none, so there are no BatchNorm statistics to keep: add --no-freeze-norm, or give weights",
    )


def main(args: Constants) -> None:
    truth, released = args.labels == "truth", args.protocol == "released"
    check(
        args.labels.replace("_", "").isalnum(),
        f'labels is "{args.labels}", but it must be the name of a step folder, or truth',
    )
    step = Step("segmenter", args, reads=() if truth else (args.labels,))
    dataset, ids = step.dataset, step.ids
    check_constants(args, dataset)
    source = dataset.labels("train") if truth else step.sources[args.labels]
    missing = [id for id in ids if not (source / f"{id}.png").exists()]
    check(not missing, f"{source} has no label of {len(missing)} train images: {and_more(missing, 3, ', ')}")
    accelerator = make_accelerator(args.precision, args.device)
    step.announce(accelerator, precision_of(accelerator))  # before weights are downloaded
    torch.manual_seed(args.seed)
    backbone = load_backbone(args.backbone, args.weights)
    model = DeepLabV3Plus(backbone, dataset.num_classes, args.width, args.freeze_norm)
    patches = TrainingPatches(ids, dataset.images("train"), source, dataset.num_classes, dataset.patch_size, args.seed)
    pretrained = [] if args.weights == "none" else [backbone]
    training = Training(model, pretrained, patches, compute_loss, args, accelerator, count=labelled_pixels)
    select = partial(segmentation_miou, dataset=dataset, args=args, device=accelerator.device)

    def row(id: str) -> list[np.ndarray]:
        """The patch, what was learnt from, and the single-scale prediction."""
        image = load_image(dataset.images("train") / f"{id}.png")
        logits = mirrored_scales(model, [to_tensor(image)[None]], accelerator.device)[0]
        label = load_label(source / f"{id}.png", dataset.num_classes)
        prediction = logits[0].argmax(0).byte().cpu().numpy()
        return [image, colourise(label, dataset.colours), colourise(prediction, dataset.colours)]

    with step.output(
        ".pt",
        state=accelerator,
        notes=({"supervision": "pixel truth of the train split"} if truth else {})
        | ({"protocol_of_the_steps": "released"} if released else {}),
        settings={"precision": precision_of(accelerator)},
    ):
        train(training, step.path, select if released else None)
        step.warn(check_losses(read_log(step.path / "log.jsonl")))
        load_checkpoint(step.path / "model.pt", model)
        model.eval()
        step.draw(row, ["image", "learnt from", "segmenter"])


if __name__ == "__main__":
    run(main, Constants, __doc__, then=renew)
