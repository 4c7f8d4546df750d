"""Files of class maps: the CAMs of step 2 and the class probabilities of step 6, small on disk, enlarged when read.

A file <id>.npz holds
  holds             "cams" or "probabilities"
  classes (k,)      uint8: the ids of the classes that have a map, ascending
  size (2,)         int32: height and width of the image
  peaks (k,)        float32: the maximum of each class over all scales
  scale0, scale1... float16 (k,h,w): the maps of each scale as shares of their class's maximum, so that no value
                    overflows; CAMs at feature size (1/16), probabilities at 1/4 of the image
  logits (K,)       float32: of all classes, the mean over scales and mirror images; empty where there are none
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np

from tools.command import UserError, check
from tools.files import write_whole

OUTPUT_STRIDE = 16  # pixels of the image for each cell of the network's maps
MOST_BYTES = 1 << 28  # that a file may unpack to where the size of its image is unknown

Holds = Literal["cams", "probabilities"]
MAKERS: dict[str, str] = {
    "cams": "infer_classification.py",
    "probabilities": "inference_segmentation.py --keep-probabilities",
}


def save_maps(
    path: Path,
    holds: Holds,
    classes: np.ndarray,
    maps: Sequence[np.ndarray],
    size: Sequence[int],
    logits: np.ndarray | None = None,
) -> None:
    """Write one file; `maps`: for each scale (k,h,w), not negative. The other arrays are described at the top."""
    peaks = np.max([scale.max((1, 2)) for scale in maps], axis=0).astype(np.float32)
    shares = [(scale / np.maximum(peaks, 1e-30)[:, None, None]).astype(np.float16) for scale in maps]
    with write_whole(path) as temporary:
        np.savez_compressed(
            temporary,
            holds=np.array(holds),
            classes=classes.astype(np.uint8),
            size=np.array(size, np.int32),
            peaks=peaks,
            logits=np.asarray([] if logits is None else logits, np.float32),
            **{f"scale{index}": scale for index, scale in enumerate(shares)},
        )


def load_maps(path: Path, num_classes: int, size: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The maps of an image of (H,W) = size -> class ids (k,) ascending, maps (k,H,W) float32 in 0..1.

    CAMs are divided by their maximum, probabilities are not. Raises `UserError` where the file is missing or damaged,
    holds other classes than 0 to num_classes - 1, belongs to an image of another size, or would unpack to more than
    this image can need.
    """
    most = 4 * num_classes * size[0] * size[1] + (1 << 16)  # bytes: full-size maps of all classes, and headers
    with _opened(path, most) as file:
        check("holds" in file, "it was written by version 0.1.0 or by another program")
        holds, classes, peaks = str(file["holds"]), file["classes"], file["peaks"].astype(np.float32)
        check(holds in MAKERS, f"it holds {holds[:40]}, not {' or '.join(MAKERS)}")
        image_size = tuple(file["size"].tolist())
        check(image_size == tuple(size), f"it belongs to an image of {image_size} pixels, not {tuple(size)}")
        ids = classes.tolist()
        check(
            classes.dtype.kind in "ui" and len(ids) > 0 and ids == sorted(set(ids) & set(range(num_classes))),
            f"its class ids must be whole numbers from 0 to {num_classes - 1} in ascending order, not {str(ids)[:80]}",
        )
        shares = [file[name] for name in sorted(file.files) if name.startswith("scale")]
        shapes = {peaks.shape, *(share.shape[:-2] for share in shares)}
        check(len(shares) > 0 and shapes == {classes.shape}, "its arrays do not fit together")
        not_negative = all(np.isfinite(values).all() and (values >= 0).all() for values in (peaks, *shares))
        check(not_negative, "its maps hold negative or infinite values")
        maps = fuse_scales([share.astype(np.float32) * peaks[:, None, None] for share in shares], size)
        if holds == "cams":
            maps = relative(maps)
        rounding = 1e-5  # of the interpolation between probabilities of 1
        check(maps.max() <= 1 + rounding, "its maps hold values outside 0 to 1")
        return np.array(ids), maps


def load_logits(path: Path) -> np.ndarray:
    """The logit of each class (K,) float32, a mean over scales and mirror images. Raises `UserError` as `load_maps`."""
    with _opened(path, MOST_BYTES) as file:
        logits = file["logits"].astype(np.float32)
        check(bool(np.isfinite(logits).all()), "its logits are not finite")
        return logits


def fuse_scales(maps: Sequence[np.ndarray], size: Sequence[int]) -> np.ndarray:
    """Class maps (k,h,w) of each scale -> their sum (k,H,W) float32, H,W = size (method section 2).

    Each scale is enlarged bilinearly (align_corners=False) to the size rounded up to the output stride; the sum is cut
    to the image.
    """
    height, width = (-(-length // OUTPUT_STRIDE) * OUTPUT_STRIDE for length in size)
    total = np.zeros((len(maps[0]), height, width), np.float32)
    for scale in maps:
        total += _enlarged(_enlarged(scale, 1, height), 2, width)
    return total[:, : size[0], : size[1]]


def relative(maps: np.ndarray) -> np.ndarray:
    """Maps (k,H,W) divided by their maximum: 0 to 1."""
    return maps / (maps.max((1, 2), keepdims=True) + np.float32(1e-5))


def _enlarged(maps: np.ndarray, axis: int, length: int) -> np.ndarray:
    """Linear interpolation along one axis; pixel centres lie at half numbers, and border pixels are continued."""
    cells = maps.shape[axis]
    place = np.clip((np.arange(length) + 0.5) * cells / length - 0.5, 0, cells - 1)
    before = place.astype(int)
    after = np.minimum(before + 1, cells - 1)
    weight = (place - before).astype(np.float32)
    weight = weight[:, None] if axis == 1 else weight
    return maps.take(before, axis) * (1 - weight) + maps.take(after, axis) * weight


@contextmanager
def _opened(path: Path, most: int) -> Iterator[np.lib.npyio.NpzFile]:
    """Yield the open file. Raises `UserError` where the file is missing or unpacks to more than `most` bytes, and for
    every error inside the block.
    """
    maker = MAKERS["probabilities" if path.parent.name.startswith("segmentation") else "cams"]
    try:
        with np.load(path, allow_pickle=False) as file:
            unpacked = sum(entry.file_size for entry in file.zip.infolist())
            check(unpacked <= most, f"it unpacks to {unpacked} bytes, more than the {most} that this image can need")
            yield file
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run python {maker}, which creates missing files") from None
    except Exception as error:  # zip, npy and shape errors have no common class
        raise UserError(
            f"{path} cannot be read as class maps ({error}): delete it, or use --overwrite, and run "
            f"python {maker} again"
        ) from None
