"""Image reconstruction loss (IR): class maps must reconstruct the image (method section 1)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

EPSILON = 1e-5


def image_reconstruction_loss(cam: Tensor, image: Tensor, image_labels: Tensor, tiles: int) -> Tensor:
    """Mean squared error of the image painted with the mean colour of each class map; a scalar.

    cam (B,K,h,w) class maps after PRC, of any range; image (B,3,H,W) normalised RGB; image_labels
    (B,K) 0/1. tiles: 1, 4, 9, ... equal parts (1 x 1, 2 x 2, ...), each with class colours of its
    own, because a class may look different in different places. Where h or w is not divisible,
    parts differ by one row or column; every value has the same weight. The colours of the reduced
    image are scaled to length 1 first. There is no background channel: a pixel in the map of no
    present class is reconstructed as 0, so the loss rewards complete maps. Computed in float32 or
    better. Raises `ValueError` as `check_tiles`.
    """
    side = check_tiles(tiles, cam.shape[-2:])
    maps = relative_maps(cam, image_labels)
    precision = maps.dtype
    with torch.autocast(cam.device.type, enabled=False):
        pixels = image.detach().to(precision)
        target = F.interpolate(pixels, cam.shape[-2:], mode="bilinear", align_corners=False)
        target = F.normalize(target, dim=1)
        error = torch.zeros((), device=target.device, dtype=precision)
        for map_tile, target_tile in zip(_tiles(maps, side), _tiles(target, side), strict=True):
            error = error + _tile_error(map_tile, target_tile)
        return error / target.numel()


def relative_maps(cam: Tensor, image_labels: Tensor) -> Tensor:
    """Maps (B,K,h,w), image_labels (B,K) 0/1 -> shares of each map's maximum, 0 for absent classes.

    The S of method section 1; in float32 or better.
    """
    precision = torch.promote_types(cam.dtype, torch.float32)
    with torch.autocast(cam.device.type, enabled=False):
        positive = F.relu(cam.to(precision))
        maps = F.relu(positive - EPSILON) / (positive.amax((2, 3), keepdim=True) + EPSILON)
        return maps * image_labels.to(precision)[:, :, None, None]


def check_tiles(tiles: int, size: Sequence[int]) -> int:
    """Tiles along each side. Raises `ValueError` unless `tiles` fits class maps of size (h,w)."""
    side = math.isqrt(max(tiles, 0))
    if tiles < 1 or side * side != tiles:
        raise ValueError(f"tiles is {tiles}, but it must be a square number (1, 4, 9, ...)")
    if min(size) < side:
        maps = f"class maps of {size[0]} x {size[1]}"
        raise ValueError(f"tiles is {tiles}, but {maps} cannot have {side} x {side} tiles")
    return side


def _tiles(x: Tensor, side: int) -> list[Tensor]:
    """(B,C,h,w) -> side x side tiles (B,C,n), row by row."""
    rows = x.tensor_split(side, 2)
    return [tile.flatten(2) for row in rows for tile in row.tensor_split(side, 3)]


def _tile_error(maps: Tensor, target: Tensor) -> Tensor:
    """Summed squared error of one tile: maps (B,K,n), target (B,3,n)."""
    colours = target @ maps.transpose(1, 2) / (maps.sum(2)[:, None] + EPSILON)  # (B,3,K)
    return (colours @ maps - target).square().sum()
