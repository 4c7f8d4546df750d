"""The `released` protocol's choice of the epoch: mIoU on the train split's PIXEL labels (method sections 1 and 5).

The released evaluation reads one scale without mirror images, drops the last incomplete batch, and counts a class that
occurs nowhere as 0 in the mean.
"""

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from models.ir_loss import relative_maps
from tools.augment import normalise, resize
from tools.cams import image_batches
from tools.command import stop
from tools.dataset import Dataset
from tools.labels import load_label
from tools.scores import ConfusionMatrix
from tools.training import Recipe


@torch.no_grad()
def cam_miou(model: nn.Module, dataset: Dataset, args: Recipe, device: torch.device) -> float:
    """mIoU of a `Classifier`'s maps at their own size, with the truth reduced to this size by Pillow's nearest.

    The prediction is the highest of the maps as the image reconstruction loss reads them, among the classes of the
    image-level label.
    """
    matrix, present = ConfusionMatrix(dataset.num_classes), dataset.image_labels("train")
    for ids, images, truths in _whole_batches(dataset, args):
        label = torch.from_numpy(np.stack([present[id] for id in ids])).to(device)
        maps = relative_maps(model.eval()(normalise(images.to(device)))[1], label)
        highest = maps.masked_fill(~label[:, :, None, None], -1).argmax(1).byte().cpu().numpy()
        for prediction, truth in zip(highest, truths, strict=True):
            matrix.update(resize(truth, prediction.shape, Image.Resampling.NEAREST), prediction)
    return _mean_with_absent_classes(matrix)


@torch.no_grad()
def segmentation_miou(model: nn.Module, dataset: Dataset, args: Recipe, device: torch.device) -> float:
    """mIoU of a segmenter at full size, on the top-left patch_size x patch_size pixels of each image."""
    matrix = ConfusionMatrix(dataset.num_classes)
    corner = slice(dataset.patch_size), slice(dataset.patch_size)
    for _, images, truths in _whole_batches(dataset, args):
        highest = model.eval()(normalise(images[..., *corner].to(device))).argmax(1).byte().cpu().numpy()
        for prediction, truth in zip(highest, truths, strict=True):
            matrix.update(truth[corner], prediction)
    return _mean_with_absent_classes(matrix)


def _whole_batches(dataset: Dataset, args: Recipe) -> Iterator[tuple[list[str], Tensor, list[np.ndarray]]]:
    """Yield ids, images (B,3,H,W) uint8 and PIXEL labels (H,W) of the train split, without an incomplete last batch."""
    ids, batch_size = dataset.ids("train"), args.batch_size
    whole = ids[: len(ids) // batch_size * batch_size]
    for some, _, (images,) in image_batches(dataset.images("train"), whole, [1.0], batch_size, args.workers, stop):
        truths = [load_label(dataset.labels("train") / f"{id}.png", dataset.num_classes) for id in some]
        yield some, images[: len(some)], truths


def _mean_with_absent_classes(matrix: ConfusionMatrix) -> float:
    """mIoU in which a class in neither truth nor prediction counts as 0."""
    return float(np.nan_to_num(matrix.scores()["iou"]).mean())
