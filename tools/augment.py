"""The patches that a training reads and their augmentation, random only through (seed, epoch, patch)."""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms.v2.functional import InterpolationMode, resize

from tools.command import check
from tools.labels import IGNORE, load_image, load_label

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, RGB in 0..1


def to_tensor(image: np.ndarray) -> Tensor:
    """(H,W,3) uint8 -> (3,H,W) uint8, a view: resizing is twice as fast where the colours of a pixel lie together."""
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


def augment(
    rng: np.random.Generator,
    image: Tensor,
    label: Tensor | None,
    patch_size: int,
    scale: tuple[float, float] = (0.5, 1.5),
) -> tuple[Tensor, Tensor | None]:
    """Random scale (bicubic), horizontal flip, normalisation, and crop or placement on zeros.

    image (3,H,W) uint8, label (H,W) uint8 or None -> image (3,S,S) float32, label (S,S) with 255 where there is no
    image; S = patch_size. The longer side becomes uniform in `scale` x S.
    """
    height, width = image.shape[-2:]
    factor = rng.uniform(*scale) * patch_size / max(height, width)
    size = [max(1, round(height * factor)), max(1, round(width * factor))]
    image = resize(image, size, InterpolationMode.BICUBIC, antialias=True)
    if label is not None:
        label = resize(label[None], size, InterpolationMode.NEAREST_EXACT)[0]
    if rng.random() < 0.5:
        image = image.flip(-1)
        label = None if label is None else label.flip(-1)
    windows = [_window(rng, length, patch_size) for length in size]
    source, target = (tuple(side) for side in zip(*windows, strict=True))
    placed = torch.zeros(3, patch_size, patch_size)
    placed[:, *target] = normalise(image[:, *source])
    if label is None:
        return placed, None
    ignored = torch.full((patch_size, patch_size), IGNORE, dtype=torch.uint8)
    ignored[target] = label[source]
    return placed, ignored


def _window(rng: np.random.Generator, length: int, patch_size: int) -> tuple[slice, slice]:
    """Along one axis: the part that is cut from the image, and its place in the patch."""
    offset = int(rng.integers(abs(length - patch_size) + 1))
    kept = min(length, patch_size)
    if length > patch_size:
        return slice(offset, offset + kept), slice(0, kept)
    return slice(0, kept), slice(offset, offset + kept)


class TrainingPatches(TorchDataset):
    """Patches of a training, indexed by (epoch, patch), so that a seed gives the same crops in any worker process.

    images: the folder of <id>.png. targets: the image-level labels, id -> (K,) bool, or the folder of label maps
    <id>.png, which are cropped like the images. Items: image (3,S,S) float32; target (K,) float32 or (S,S) int64.
    Raises `UserError` for a bad file.
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
        rng = np.random.default_rng((self.seed, epoch, index))
        image = to_tensor(load_image(self.images / f"{id}.png"))
        if isinstance(self.targets, dict):
            return augment(rng, image, None, self.patch_size)[0], torch.from_numpy(self.targets[id]).float()
        label = torch.from_numpy(load_label(self.targets / f"{id}.png", self.num_classes))
        check(
            label.shape == image.shape[1:],
            f"{self.targets / id}.png has {label.shape[1]} x {label.shape[0]} pixels, but its image has "
            f"{image.shape[2]} x {image.shape[1]}: make the label map again",
        )
        image, target = augment(rng, image, label, self.patch_size)
        assert target is not None
        return image, target.long()
