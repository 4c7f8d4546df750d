"""The patches of a training and their augmentation, random only through (seed, epoch, patch)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from tools.command import check
from tools.labels import IGNORE, load_image, load_label

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, RGB in 0..1


def to_tensor(image: np.ndarray) -> Tensor:
    """(H,W,3) uint8 -> (3,H,W) uint8, a view."""
    return torch.from_numpy(image).permute(2, 0, 1)


@cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (3,1,1), made once: a GPU waits for each copy of new ones."""
    with torch.inference_mode(False):
        mean, std = (torch.tensor(value, device=device)[:, None, None] for value in (MEAN, STD))
        return mean, std


def normalise(image: Tensor) -> Tensor:
    """(...,3,H,W) uint8 -> float32: minus ImageNet's mean, divided by its standard deviation."""
    mean, std = _statistics(image.device)
    return (image / 255).sub_(mean).div_(std)


def resize(pixels: np.ndarray, size: tuple[int, int], filter: Image.Resampling) -> np.ndarray:
    """(H,W) or (H,W,3) uint8 -> (h,w) or (h,w,3), (h,w) = size, by Pillow, as the release."""
    return np.array(Image.fromarray(pixels).resize(size[::-1], filter))


@dataclass(frozen=True)
class Crop:
    """An image resized to `size`, perhaps mirrored; its part `source` lies at `target` of a patch."""

    patch_size: int
    size: tuple[int, int]
    mirrored: bool
    source: tuple[slice, slice]
    target: tuple[slice, slice]

    def cut(self, pixels: np.ndarray, filter: Image.Resampling) -> Tensor:
        """(H,W) or (H,W,3) uint8 -> the part of the resized pixels that lies in the patch."""
        resized = torch.from_numpy(resize(pixels, self.size, filter))
        return (resized.flip(1) if self.mirrored else resized)[self.source]

    def image(self, image: np.ndarray) -> Tensor:
        """(H,W,3) uint8 -> normalised (3,S,S) float32, 0 where there is no image; S = patch_size."""
        patch = torch.zeros(3, self.patch_size, self.patch_size)
        pixels = self.cut(image, Image.Resampling.BICUBIC)
        patch[:, *self.target] = normalise(pixels.permute(2, 0, 1))
        return patch

    def label(self, label: np.ndarray) -> Tensor:
        """Class ids (H,W) uint8 -> (S,S) int64, 255 where there is no image; S = patch_size."""
        patch = torch.full((self.patch_size, self.patch_size), IGNORE)
        patch[self.target] = self.cut(label, Image.Resampling.NEAREST).long()
        return patch


def random_crop(
    random: np.random.Generator, size: Sequence[int], patch_size: int, scales: tuple[float, float] = (0.5, 1.5)
) -> Crop:
    """The training augmentation of an image of (H,W) = size (method section 1).

    The longer side becomes a whole number, uniform in `scales` x S, S = patch_size. A resized side
    longer than S is cut at a random place, a shorter side lies at a random place of the patch.
    """
    shortest, longest = (int(scale * patch_size) for scale in scales)
    longer = int(random.integers(shortest, longest, endpoint=True))
    height, width = (max(1, round(length * longer / max(size))) for length in size)
    mirrored = bool(random.random() < 0.5)
    rows, columns = (_place(random, length, patch_size) for length in (height, width))
    return Crop(patch_size, (height, width), mirrored, (rows[0], columns[0]), (rows[1], columns[1]))


def _place(random: np.random.Generator, length: int, patch_size: int) -> tuple[slice, slice]:
    """Along one axis: the part that is cut from the image, and its place in the patch."""
    offset = int(random.integers(abs(length - patch_size) + 1))
    size = min(length, patch_size)
    start, shifted = slice(0, size), slice(offset, offset + size)
    return (shifted, start) if length > patch_size else (start, shifted)


class TrainingPatches(TorchDataset):
    """Patches indexed by (epoch, patch), so that a seed gives the same crops in any worker process.

    images: the folder of <id>.png. targets: the image-level labels, id -> (K,) bool, or the folder
    of label maps <id>.png, which are cropped like the images. Items: image (3,S,S) float32; target
    (K,) float32 or (S,S) int64. Raises `UserError` for a bad file.
    """

    def __init__(
        self,
        ids: list[str],
        images: Path,
        targets: dict[str, np.ndarray] | Path,
        num_classes: int,
        patch_size: int,
        seed: int,
    ):
        self.ids, self.images, self.targets, self.num_classes = ids, images, targets, num_classes
        self.patch_size, self.seed = patch_size, seed

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key
        id = self.ids[index]
        image = load_image(self.images / f"{id}.png")
        random = np.random.default_rng((self.seed, epoch, index))
        crop = random_crop(random, image.shape[:2], self.patch_size)
        if isinstance(self.targets, dict):
            return crop.image(image), torch.from_numpy(self.targets[id]).float()
        label = load_label(self.targets / f"{id}.png", self.num_classes)
        check(
            label.shape == image.shape[:2],
            f"{self.targets / id}.png has {label.shape[1]} x {label.shape[0]} pixels, but its image has "
            f"{image.shape[1]} x {image.shape[0]}: make the label map again",
        )
        return crop.image(image), crop.label(label)
