"""Masks on the device they were made on: packed to bits, counted, boxed."""

import torch
from torch import Tensor
from torch.nn import functional as F

GATHER = 0x8040201008040201 - (1 << 64)  # as a signed number


def _eights(masks: Tensor) -> Tensor:
    """(M,H,W) bool -> (M,ceil(H*W/8)) int64 whose eight bytes are eight pixels, 0 or 1."""
    flat = masks.flatten(1)
    return F.pad(flat, (0, -flat.shape[1] % 8)).contiguous().view(torch.int64)


def pack_bits(masks: Tensor) -> Tensor:
    """(M,H,W) bool -> (M,ceil(H*W/8)) uint8, as numpy.packbits: one product moves byte i of eight to bit 63 - i."""
    return ((_eights(masks) * GATHER) >> 56).to(torch.uint8)


def count_pixels(masks: Tensor) -> Tensor:
    """(M,H,W) bool -> (M,) pixels: up to 255 times eight bytes are added in one number before they are spread."""
    eights = _eights(masks)
    eights = F.pad(eights, (0, -eights.shape[1] % 255)).unflatten(1, (255, -1)).sum(1)
    return eights.view(torch.uint8).sum(1, dtype=torch.int64)


def outer_boxes(masks: Tensor) -> Tensor:
    """(M,H,W) bool -> (M,4) int64 x0, y0, x1, y1 of the outermost pixels; zeros for an empty mask."""
    ends = []
    for dim in (1, 2):  # over rows leaves columns
        line = masks.view(torch.uint8).amax(dim) > 0
        place = torch.arange(line.shape[1], device=masks.device)
        first = torch.where(line, place, line.shape[1]).amin(1)
        last = torch.where(line, place, -1).amax(1)
        ends += [first.where(last >= 0, 0), last.clamp(min=0)]
    return torch.stack([ends[0], ends[2], ends[1], ends[3]], dim=1)
