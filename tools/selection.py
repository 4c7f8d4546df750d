"""The `released` protocol's choice of the epoch: mIoU on the train split's PIXEL labels (method sections 1 and 5).

The released evaluation reads one scale without mirror images, drops the last incomplete batch, and counts a class that
occurs nowhere as 0 in the mean.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from models.ir_loss import relative_maps
from tools.augment import normalise
from tools.command import stop
from tools.inference import image_batches
from tools.labels import load_label, resize_label
from tools.scores import ConfusionMatrix
from tools.step import Step


@torch.no_grad()
def cam_miou(model: nn.Module, step: Step) -> float:
    """mIoU of a `Classifier`'s maps at their own size, with the truth reduced to this size.

    The prediction is the highest of the maps as the image reconstruction loss reads them. A cell where every map is 0
    becomes class 0, also where the image-level label is without class 0.
    """
    matrix = ConfusionMatrix(step.dataset.num_classes)
    for ids, images, truths in _full_batches(step):
        image_labels = torch.from_numpy(np.stack([step.image_labels[id] for id in ids])).to(step.device)
        _, maps = model.eval()(normalise(images.to(step.device)))
        predictions = relative_maps(maps, image_labels).argmax(1).byte().cpu().numpy()
        for prediction, truth in zip(predictions, truths, strict=True):
            matrix.update(resize_label(truth, prediction.shape), prediction)
    return _mean_with_absent_classes(matrix)


@torch.no_grad()
def segmentation_miou(model: nn.Module, step: Step) -> float:
    """mIoU of a segmenter at full size, on the top-left patch_size x patch_size pixels of each image."""
    matrix = ConfusionMatrix(step.dataset.num_classes)
    corner = slice(step.dataset.patch_size), slice(step.dataset.patch_size)
    for _, images, truths in _full_batches(step):
        logits = model.eval()(normalise(images[..., *corner].to(step.device)))
        for prediction, truth in zip(logits.argmax(1).byte().cpu().numpy(), truths, strict=True):
            matrix.update(truth[corner], prediction)
    return _mean_with_absent_classes(matrix)


def _full_batches(step: Step) -> Iterator[tuple[list[str], Tensor, list[np.ndarray]]]:
    """Yield ids, images (B,3,H,W) uint8 and PIXEL labels (H,W) of the train split, without an incomplete last batch."""
    dataset, batch_size = step.dataset, step.args.batch_size
    ids = step.ids[: len(step.ids) // batch_size * batch_size]
    batches = image_batches(dataset.images("train"), ids, [1.0], batch_size, step.args.workers, stop)
    for batch_ids, _, (images,) in batches:
        truths = [load_label(dataset.labels("train") / f"{id}.png", dataset.num_classes) for id in batch_ids]
        yield batch_ids, images, truths


def _mean_with_absent_classes(matrix: ConfusionMatrix) -> float:
    """mIoU in which a class in neither truth nor prediction counts as 0."""
    return float(np.nan_to_num(matrix.scores()["iou"]).mean())
