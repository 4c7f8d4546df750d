"""Mask files: the regions of one patch as <id>.npz, packed to one bit a pixel.

For M masks of a patch of H x W pixels a file holds, in falling predicted IoU (no rule needs this order; M may be 0):
  size (2,) int32              H, W
  bits (M, ceil(H*W/8)) uint8  each mask in row order, the first pixel in the highest bit (numpy.packbits)
  areas (M,) int32             pixels
  boxes (M,4) int32            x0, y0, x1, y1 of the outermost pixels, both ends included; 0 0 0 0 for an empty mask.
                               SAM's own XYWH boxes are x0, y0, x1 - x0, y1 - y0
  predicted_iou (M,) float32   what SAM's decoder expects the mask's IoU to be
  stability (M,) float32       SAM's stability score
It is an ordinary npz (numpy.savez_compressed writes it, numpy.load reads it, nothing is pickled). Files that an earlier
version compressed by LZMA have the same content and are read as well.
"""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from tools.command import UserError, check
from tools.files import write_whole
from tools.steps import STEPS

MOST_MASKS = 10_000  # of one patch; SAM's default grid can give 3,072, and a 512 px patch gives a few hundred
MOST_BYTES = 1 << 30  # of one patch's unpacked file; a 512 px patch with 10,000 masks needs a third of it
HEADER = 1024  # bytes: more than the header of an array takes


@dataclass(frozen=True, eq=False)
class Masks:
    """M masks of one patch of size (H, W), in memory as in the file."""

    size: tuple[int, int]
    bits: np.ndarray  # (M, ceil(H*W/8)) uint8
    areas: np.ndarray  # (M,) int32
    boxes: np.ndarray  # (M,4) int32
    predicted_iou: np.ndarray  # (M,) float32
    stability: np.ndarray  # (M,) float32

    def __len__(self) -> int:
        return len(self.areas)

    def unpack(self) -> np.ndarray:
        """(M,H,W) bool."""
        height, width = self.size
        flat = np.unpackbits(self.bits, axis=1, count=height * width)
        return flat.view(bool).reshape(len(self), height, width)

    def chosen(self, index: np.ndarray) -> "Masks":
        """The masks at these positions."""
        return Masks(self.size, *(getattr(self, name)[index] for name in DTYPES))


DTYPES = {
    "bits": np.uint8,
    "areas": np.int32,
    "boxes": np.int32,
    "predicted_iou": np.float32,
    "stability": np.float32,
}


def pack_masks(
    masks: np.ndarray, predicted_iou: np.ndarray | None = None, stability: np.ndarray | None = None
) -> Masks:
    """(M,H,W) bool -> `Masks` in falling predicted IoU; ties keep the given order; scores that are not given are 1."""
    masks = np.asarray(masks, bool)
    count, height, width = masks.shape
    packed = Masks(
        (height, width),
        np.packbits(masks.reshape(count, height * width), axis=1),
        masks.sum((1, 2), dtype=np.int32),
        _boxes(masks),
        np.ones(count, np.float32) if predicted_iou is None else np.asarray(predicted_iou, np.float32),
        np.ones(count, np.float32) if stability is None else np.asarray(stability, np.float32),
    )
    return packed.chosen(np.argsort(-packed.predicted_iou, kind="stable"))


def _boxes(masks: np.ndarray) -> np.ndarray:
    boxes = np.zeros((len(masks), 4), np.int32)
    for axis in (0, 1):
        line = np.asarray(masks.any(axis + 1))  # columns with a pixel, then rows with a pixel
        boxes[:, axis] = line.argmax(1)
        boxes[:, axis + 2] = (line.shape[1] - 1 - line[:, ::-1].argmax(1)) * line.any(1)
    return boxes


def save_masks(path: Path, masks: Masks) -> None:
    """Write one mask file, whole or not at all; raises `UserError` for more masks than `load_masks` reads."""
    check(
        len(masks) <= MOST_MASKS and masks.bits.nbytes <= MOST_BYTES,
        f"{path} would hold {len(masks)} masks of {masks.size[0]} x {masks.size[1]} pixels, but a mask file holds at "
        f"most {MOST_MASKS} masks and {MOST_BYTES >> 20} MB: raise min_area or pred_iou_thresh, or cut smaller patches",
    )
    arrays = {name: getattr(masks, name).astype(dtype) for name, dtype in DTYPES.items()}
    with write_whole(path) as temporary:
        np.savez_compressed(temporary, size=np.array(masks.size, np.int32), **arrays)


def load_masks(path: Path, size: tuple[int, int] | None = None) -> Masks:
    """Read one mask file. `size` is the (H, W) of its image, where the caller knows it.

    Raises `UserError` when the file is missing or damaged, is no mask file or holds masks of another size than `size`.
    A file that declares more than `MOST_MASKS` or `MOST_BYTES` is refused before it is unpacked.
    """
    command = _command(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            # what an entry declares here is also the most that zipfile unpacks of it
            declared = sum(entry.file_size for entry in file.zip.infolist())
            if declared > MOST_BYTES or file.zip.getinfo("areas.npy").file_size > 4 * MOST_MASKS + HEADER:
                raise ValueError(f"it declares {declared} bytes, or more than {MOST_MASKS} masks")
            height, width = map(int, file["size"])
            masks = Masks((height, width), **{name: file[name] for name in DTYPES})
        _check(masks)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: make it with step 9, {command}") from None
    except Exception as error:  # zip, zlib, lzma, npy and shape errors have no common class
        raise UserError(f"{path} is not a readable mask file ({error}): delete it and run step 9, {command}") from None
    if size is not None and tuple(size) != masks.size:
        raise UserError(
            f"{path} holds masks of {height} x {width} pixels, but its image has {size[0]} x {size[1]}: make the "
            f"masks again with step 9, {command} --overwrite"
        )
    return masks


def _command(path: Path) -> str:
    """The command that makes a mask file, with its data set and split where they can be read from the path."""
    parts = path.parts
    if parts[-5:-4] != ("datasets",):
        return STEPS["sam_masks"].command(None)
    return STEPS["sam_masks"].command(SimpleNamespace(dataset=parts[-4], root=path.parents[4]), split=parts[-3])


def _check(masks: Masks) -> None:
    """Raise `ValueError` unless the arrays have the types, shapes and areas that the top of this file describes."""
    count, (height, width) = len(masks.bits), masks.size
    if height < 1 or width < 1:
        raise ValueError(f"it declares {height} x {width} pixels")
    shapes = {name: (count,) for name in DTYPES} | {"bits": (count, -(-height * width // 8)), "boxes": (count, 4)}
    for name, dtype in DTYPES.items():
        array = getattr(masks, name)
        if array.dtype != dtype or array.shape != shapes[name]:
            raise ValueError(
                f"{name} is {array.dtype} {array.shape}, but {np.dtype(dtype)} {shapes[name]} was expected"
            )
    if (np.bitwise_count(masks.bits).sum(1) != masks.areas).any():
        raise ValueError("its areas are not those of its bits")
