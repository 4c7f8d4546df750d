"""Image reconstruction loss (IR): the class maps must paint the image, one colour a class (method section 1)."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

EPSILON = 1e-5


def image_reconstruction_loss(cam: Tensor, image: Tensor, label: Tensor, tiles: int = 4) -> Tensor:
    """How badly the class maps, each with its mean colour, reconstruct the image; a scalar.

    cam (B,K,h,w) class maps after PRC, of any range; image (B,3,H,W) normalised RGB; label (B,K) 0/1 image-level
    labels; tiles: 1, 4, 9, ... equal parts (1 x 1, 2 x 2, ...) in each of which the class colours are found anew, so
    that one class may look different in different places. Where h or w does not divide, parts differ by one row or
    column; every value counts the same. There is no background channel: what no present class claims is reconstructed
    as black, and so the maps must become complete. Runs in float32 at least. Raises ValueError when tiles is not a
    square.
    """
    side = math.isqrt(max(tiles, 0))
    if tiles < 1 or side * side != tiles:
        raise ValueError(f"tiles is {tiles}, but it must be a square number (1, 4, 9, ...)")
    if min(cam.shape[-2:]) < side:
        raise ValueError(f"class maps of {cam.shape[-2]} x {cam.shape[-1]} cannot be cut into {side} x {side} tiles")
    precision = torch.promote_types(cam.dtype, torch.float32)
    with torch.autocast(cam.device.type, enabled=False):
        positive = F.relu(cam.to(precision))
        maps = F.relu(positive - EPSILON) / (positive.amax((2, 3), keepdim=True) + EPSILON)
        maps = maps * label.to(precision)[:, :, None, None]
        target = F.interpolate(image.detach().to(precision), cam.shape[-2:], mode="bilinear", align_corners=False)
        target = F.normalize(target, dim=1)
        error = sum(
            _tile_error(map_tile.flatten(2), target_tile.flatten(2))
            for map_row, target_row in zip(maps.tensor_split(side, 2), target.tensor_split(side, 2), strict=True)
            for map_tile, target_tile in zip(
                map_row.tensor_split(side, 3), target_row.tensor_split(side, 3), strict=True
            )
        )
        return error / target.numel()


def _tile_error(maps: Tensor, target: Tensor) -> Tensor:
    """Summed squared error of one tile: maps (B,K,n), target (B,3,n)."""
    colours = target @ maps.transpose(1, 2) / (maps.sum(2)[:, None] + EPSILON)  # (B,3,K)
    return (colours @ maps - target).square().sum()
