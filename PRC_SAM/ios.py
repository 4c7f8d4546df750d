"""IOS, the intersection optimisation strategy (method, sections 4 and 7): the formula, on masks packed to bits.

For every class c, ascending, with P = {label == c} of the original map, and for every mask S: let I = |P and S|. Where
the overlap coefficient I / min(|P|, |S|) reaches tau, the smaller of the two regions takes class c (P when both have
the same size). Later writes win.

All writes of one class have the same value and P never changes, so the order of the masks cannot change the result: the
regions that a class writes are united, and the unions are laid over each other in the order of the classes. Masks and
classes are packed to one bit a pixel, 64 pixels to a word: an overlap is an AND and a population count.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tools.command import check
from tools.labels import IGNORE
from tools.masks import Masks, pack_masks


def intersection_optimisation(
    label: np.ndarray, masks: np.ndarray | Masks, classes: Iterable[int], tau: float
) -> np.ndarray:
    """Refine a label map with masks: (H,W) uint8, (M,H,W) bool or `Masks` -> (H,W) uint8, a new array.

    `classes` are the ids that may be written, in any order; ids without a pixel in the map have no effect. Pixels of
    255 belong to no class, but a mask that takes a class covers them too. The overlap coefficient is a float64 quotient
    and tau a float64: 9 of 10 pixels reach tau = 0.9. tau = 0 accepts any overlap of at least one pixel.
    Raises `UserError` for tau outside 0 to 1 and for masks of another size than the map.
    """
    check(0 <= tau <= 1, f"tau is {tau}, but it must lie between 0 and 1")
    ids, planes, words = packed(label, masks, classes)
    areas, pixels, shared = words.areas, counts(planes)[:, None], words.overlaps(planes)
    smallest = np.maximum(np.minimum(areas, pixels), 1)  # not 0: empty regions share no pixel, so they never reach tau
    reached = (shared > 0) & (shared / smallest >= tau)
    own = reached & (areas >= pixels)  # (K,M): the class writes its own region P, elsewhere the mask
    written = np.zeros_like(planes)
    for index, mask in np.argwhere(reached & ~own):
        values, places = words.of(mask)
        written[index, places] |= values
    written[own.any(axis=1)] |= planes[own.any(axis=1)]
    return laid_over(label, ids, written)


@dataclass(frozen=True)
class Words:
    """M masks as words of 64 pixels, without the words that hold no pixel: most masks are small, so few words remain.

    The words of mask m are those from starts[m] to starts[m + 1].
    """

    values: np.ndarray  # (n,) uint64
    places: np.ndarray  # (n,) int64: which word of the image
    starts: np.ndarray  # (M+1,) int64

    def of(self, mask: int) -> tuple[np.ndarray, np.ndarray]:
        """Values and places of one mask."""
        span = slice(self.starts[mask], self.starts[mask + 1])
        return self.values[span], self.places[span]

    def sums(self, numbers: np.ndarray) -> np.ndarray:
        """(...,n) whole numbers, one for each word -> (...,M) int64: their sum over each mask."""
        total = np.zeros((*numbers.shape[:-1], len(self.values) + 1), np.int64)
        np.cumsum(numbers, axis=-1, out=total[..., 1:])
        return total[..., self.starts[1:]] - total[..., self.starts[:-1]]

    @cached_property
    def areas(self) -> np.ndarray:
        """(M,) int64: pixels."""
        return self.sums(np.bitwise_count(self.values))

    def overlaps(self, planes: np.ndarray) -> np.ndarray:
        """(K,words) classes -> (K,M) int64: pixels that class and mask share."""
        return self.sums(np.bitwise_count(planes[:, self.places] & self.values))


def packed(label: np.ndarray, masks: np.ndarray | Masks, classes: Iterable[int]) -> tuple[list[int], np.ndarray, Words]:
    """The inputs of a rule -> class ids ascending, the pixels of these classes (K,words) uint64, the masks.

    Raises `UserError` when the masks have another size than the map.
    """
    ids = sorted({int(c) for c in classes})
    if label.dtype != np.uint8 or label.ndim != 2 or any(not 0 <= c < IGNORE for c in ids):
        raise ValueError(
            f"expected an (H,W) uint8 map and class ids below {IGNORE}, got {label.dtype} of {label.shape} and {ids}"
        )
    if not isinstance(masks, Masks):
        masks = pack_masks(masks)
    check(
        masks.size == label.shape,
        f"the label map has {label.shape[0]} x {label.shape[1]} pixels, but the masks have "
        f"{masks.size[0]} x {masks.size[1]}",
    )
    words = _words(masks.bits)
    filled = np.flatnonzero(words != 0)
    starts = np.searchsorted(filled, np.arange(len(words) + 1) * words.shape[1])
    planes = np.zeros((len(ids), words.shape[1]), np.uint64)
    for plane, c in zip(planes, ids, strict=True):
        plane[:] = _words(np.packbits(label == c)[None])[0]
    return ids, planes, Words(words.ravel()[filled], filled % words.shape[1], starts)


def counts(words: np.ndarray) -> np.ndarray:
    """(..., words) uint64 -> (...) int64: pixels."""
    return np.bitwise_count(words).sum(axis=-1, dtype=np.int64)


def laid_over(label: np.ndarray, ids: list[int], written: np.ndarray) -> np.ndarray:
    """The map (H,W) with class ids[k] on the pixels written[k] (K,words); the highest id wins where several write."""
    painted = np.zeros(label.shape, np.uint8)  # 1 + the class, 0 where no class was written
    for c, plane in zip(ids, written, strict=True):
        inside = np.unpackbits(plane.view(np.uint8), count=label.size).reshape(label.shape)
        np.maximum(painted, inside * np.uint8(c + 1), out=painted)
    return np.where(painted > 0, painted - np.uint8(1), label)


def _words(bits: np.ndarray) -> np.ndarray:
    """(N,bytes) uint8 -> (N,words) uint64, zeros appended."""
    rest = -bits.shape[1] % 8
    bits = np.pad(bits, ((0, 0), (0, rest))) if rest else bits
    return np.ascontiguousarray(bits).view(np.uint64)
