"""Images for inference, at several scales and with their mirror images, and a model prepared for them."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from models.backbone import fold_batchnorm
from tools.augment import normalise, resize, to_tensor
from tools.command import UserError
from tools.labels import load_image

Model = TypeVar("Model", bound=nn.Module)
ScaledImages = Sequence[Tensor]  # for each scale images (B,3,h,w) uint8


def for_inference(model: Model, device: torch.device) -> Model:
    """`model` in evaluation mode, BatchNorm folded into the convolutions, on `device`, weights channels_last."""
    fold_batchnorm(model.eval())
    model.requires_grad_(True)  # autocast caches its bf16 copies only of weights that require gradients
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def at_scales(image: np.ndarray, scales: Sequence[float]) -> list[Tensor]:
    """Image (H,W,3) uint8 -> for each scale (3,h,w) uint8, resized by Pillow's bicubic filter (method section 2)."""
    images = []
    for scale in scales:
        height, width = (max(1, round(length * scale)) for length in image.shape[:2])
        images.append(to_tensor(resize(image, (height, width), Image.Resampling.BICUBIC)))
    return images


def stack_scales(images: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Images of equal size, each as `at_scales` gives it -> for each scale (B,3,h,w) uint8."""
    return [torch.stack(scale) for scale in zip(*images, strict=True)]


def to_device(images: Tensor, device: torch.device) -> Tensor:
    """Copy to a GPU from pinned memory: a copy from other memory would wait until the GPU has finished its queue."""
    if device.type == "cuda":
        images = images.pin_memory()
    return images.to(device, non_blocking=True)


def with_mirrors(images: Tensor, device: torch.device) -> Tensor:
    """(B,3,h,w) uint8 -> normalised (2B,3,h,w) float32 on `device`: the images, then their mirror images."""
    x = normalise(to_device(images, device))
    return torch.cat([x, x.flip(-1)]).contiguous(memory_format=torch.channels_last)


class _Images(Dataset):
    """Items: id, size (H,W), the image at each scale, and the error of a bad file, which must not end the whole run."""

    def __init__(self, folder: Path, ids: Sequence[str], scales: Sequence[float]):
        self.folder, self.ids, self.scales = folder, ids, scales

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[str, tuple[int, ...], list[Tensor], str]:
        id = self.ids[index]
        try:
            image = load_image(self.folder / f"{id}.png")
        except UserError as error:
            return id, (), [], str(error)
        return id, image.shape[:2], at_scales(image, self.scales), ""


def image_batches(
    folder: Path,
    ids: Sequence[str],
    scales: Sequence[float],
    images_at_once: int,
    workers: int,
    fail: Callable[[str], None],
) -> Iterator[tuple[list[str], tuple[int, ...], list[Tensor]]]:
    """Yield ids, size (H,W) and `ScaledImages` of up to `images_at_once` neighbours of equal size.

    The worker processes read and resize the images. `fail` is called with the error of a bad file.
    """
    ids_of_batch: list[str] = []
    images: list[list[Tensor]] = []
    size_of_batch: tuple[int, ...] = ()
    for id, size, image, error in DataLoader(_Images(folder, ids, scales), batch_size=None, num_workers=workers):
        if error:
            fail(error)
            continue
        if images and (len(images) == images_at_once or size_of_batch != tuple(size)):
            yield ids_of_batch, size_of_batch, stack_scales(images)
            ids_of_batch, images = [], []
        size_of_batch = tuple(size)
        ids_of_batch.append(id)
        images.append(image)
    if images:
        yield ids_of_batch, size_of_batch, stack_scales(images)
