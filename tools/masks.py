"""Mask files: what SAM found in one patch, as <id>.npz, packed to one bit a pixel.

A file holds, for M masks of a patch of H x W pixels, in falling predicted IoU (the order that IOS expects; M may be 0):
  size (2,) int32            H, W
  bits (M, ceil(H*W/8)) uint8  each mask in row order, the first pixel in the highest bit (numpy.packbits)
  areas (M,) int32           pixels
  boxes (M,4) int32          x0, y0, x1, y1 of the outermost pixels, both ends included; 0 0 0 0 for an empty mask.
                             SAM's own XYWH boxes are x0, y0, x1 - x0, y1 - y0
  predicted_iou, stability (M,) float32
It is an ordinary npz (numpy.load reads it, nothing is pickled), compressed by LZMA: a quarter smaller than deflate on
the ragged outlines of aerial regions, and as fast to read.
"""

import lzma
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tools.command import UserError
from tools.files import write_whole

DTYPES = {
    "size": np.int32,
    "bits": np.uint8,
    "areas": np.int32,
    "boxes": np.int32,
    "predicted_iou": np.float32,
    "stability": np.float32,
}
MOST_PIXELS = 100_000_000  # of one patch; larger declarations are refused before anything is allocated
MOST_BYTES = 2 << 30  # of the packed masks of one patch


class Masks:
    """M masks of one patch. `bits` may be a function that reads them; it is called when they are first asked for."""

    def __init__(
        self,
        size: tuple[int, int],
        bits: np.ndarray | Callable[[], np.ndarray],
        areas: np.ndarray,
        boxes: np.ndarray,
        predicted_iou: np.ndarray,
        stability: np.ndarray,
    ):
        self.size, self._bits = (int(size[0]), int(size[1])), bits
        self.areas, self.boxes, self.predicted_iou, self.stability = areas, boxes, predicted_iou, stability

    def __len__(self) -> int:
        return len(self.areas)

    @property
    def bits(self) -> np.ndarray:
        """(M, ceil(H*W/8)) uint8."""
        if callable(self._bits):
            self._bits = self._bits()
        return self._bits

    def unpack(self) -> np.ndarray:
        """(M,H,W) bool."""
        height, width = self.size
        flat = np.unpackbits(self.bits, axis=1, count=height * width)
        return flat.view(bool).reshape(len(self), height, width)

    def chosen(self, index: np.ndarray) -> "Masks":
        """The masks at these positions."""
        return Masks(
            self.size,
            self.bits[index],
            self.areas[index],
            self.boxes[index],
            self.predicted_iou[index],
            self.stability[index],
        )


def pack_masks(
    masks: np.ndarray, predicted_iou: np.ndarray | None = None, stability: np.ndarray | None = None
) -> Masks:
    """(M,H,W) bool -> `Masks` in falling predicted IoU, equal ones in the given order; scores not given count as 1."""
    masks = np.asarray(masks, bool)
    count, height, width = masks.shape
    scores = [np.ones(count) if score is None else np.asarray(score) for score in (predicted_iou, stability)]
    predicted_iou, stability = (score.astype(np.float32) for score in scores)
    packed = Masks(
        (height, width),
        np.packbits(masks.reshape(count, height * width), axis=1),
        masks.sum((1, 2), dtype=np.int32),
        _boxes(masks),
        predicted_iou,
        stability,
    )
    return packed.chosen(np.argsort(-predicted_iou, kind="stable"))


def _boxes(masks: np.ndarray) -> np.ndarray:
    boxes = np.zeros((len(masks), 4), np.int32)
    for axis, line in ((0, masks.any(1)), (1, masks.any(2))):  # columns that hold a pixel, rows that hold one
        boxes[:, axis] = line.argmax(1)
        boxes[:, axis + 2] = (line.shape[1] - 1 - line[:, ::-1].argmax(1)) * line.any(1)
    return boxes


def save_masks(path: Path, masks: Masks) -> None:
    """Write one mask file, whole or not at all."""
    arrays = {
        "size": masks.size,
        "bits": masks.bits,
        "areas": masks.areas,
        "boxes": masks.boxes,
        "predicted_iou": masks.predicted_iou,
        "stability": masks.stability,
    }
    with write_whole(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_LZMA) as archive:
        for name, dtype in DTYPES.items():
            entry = zipfile.ZipInfo(f"{name}.npy")  # without a date, so that equal masks give equal files
            entry.compress_type = zipfile.ZIP_LZMA
            with archive.open(entry, "w") as file:
                np.lib.format.write_array(file, np.ascontiguousarray(arrays[name], dtype), allow_pickle=False)


def load_masks(path: Path, remedy: str = "make it again with PRC_SAM/get_se_map.py") -> Masks:
    """Read one mask file; its bits when they are first used.

    Raises `UserError` when the file is missing, damaged, of another kind, or declares more than `MOST_PIXELS` or
    `MOST_BYTES`; a damaged `bits` entry raises on first use.
    """
    path = Path(path)

    def bad(reason: str) -> UserError:
        return UserError(f"{path} {reason}: {remedy}")

    if not path.exists():
        raise bad("is missing")
    try:
        with zipfile.ZipFile(path) as archive:
            shapes = {name: _declared_shape(archive, name) for name in DTYPES}
            arrays = {}
            if shapes["size"] != (2,):
                raise ValueError("its size is not two numbers")
            height, width = (int(number) for number in _read(archive, "size"))
            _check_shapes(height, width, shapes)
            arrays = {name: _read(archive, name) for name in ("areas", "boxes", "predicted_iou", "stability")}
    except (
        zipfile.BadZipFile,
        lzma.LZMAError,
        zlib.error,
        EOFError,
        KeyError,
        ValueError,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise bad(f"is not a readable mask file ({error})") from None

    def bits() -> np.ndarray:
        try:
            with zipfile.ZipFile(path) as archive:
                return _read(archive, "bits")
        except (zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, KeyError, ValueError, RuntimeError) as error:
            raise bad(f"is damaged ({error})") from None

    return Masks((height, width), bits, **arrays)


def _declared_shape(archive: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    """The shape that the header of one entry declares, checked against its type and its length in the archive."""
    entry = archive.getinfo(f"{name}.npy")
    with archive.open(entry) as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{name} has another npy version")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype != DTYPES[name] or fortran or min(shape, default=0) < 0:
            raise ValueError(f"{name} holds {dtype}, not {np.dtype(DTYPES[name])} in row order")
        if entry.file_size != file.tell() + int(np.prod(shape, dtype=object)) * dtype.itemsize:
            raise ValueError(f"{name} is not as long as it declares")
    return shape


def _check_shapes(height: int, width: int, shapes: dict[str, tuple[int, ...]]) -> None:
    if height < 1 or width < 1 or height * width > MOST_PIXELS:
        raise ValueError(f"it declares {height} x {width} pixels")
    count, length = shapes["areas"][0] if len(shapes["areas"]) == 1 else -1, -(-height * width // 8)
    expected = {
        "size": (2,),
        "bits": (count, length),
        "areas": (count,),
        "boxes": (count, 4),
        "predicted_iou": (count,),
        "stability": (count,),
    }
    if shapes != expected:
        raise ValueError("its arrays do not fit together")
    if count * (length + 1) > MOST_BYTES:
        raise ValueError(f"it declares {count} masks of {height} x {width} pixels")


def _read(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False)
