"""Label maps and patches as PNG files, and the exact way from colours to class ids."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from tools.command import UserError, check
from tools.files import write_whole

IGNORE = 255


def colour_keys(rgb: np.ndarray) -> np.ndarray:
    """(..., 3) uint8 colours -> (...) int32 keys R<<16 | G<<8 | B."""
    rgb = rgb.astype(np.int32)
    return rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]


class ColourDecoder:
    """Colours to class ids by a table of all 2^24 colours: an unknown colour becomes no class.

    `colours` (K,3) uint8 in the order of the ids; `ignore_colours` (J,3) become 255.
    """

    UNKNOWN = 254

    def __init__(self, colours: np.ndarray, ignore_colours: np.ndarray):
        self.table = np.full(1 << 24, self.UNKNOWN, np.uint8)
        self.table[colour_keys(ignore_colours)] = IGNORE
        self.table[colour_keys(colours)] = np.arange(len(colours))

    def __call__(self, rgb: np.ndarray, counts: dict[tuple[int, int, int], int] | None = None) -> np.ndarray:
        """(H,W,3) uint8 -> (H,W) uint8 ids; unknown colours become 255 and are counted in `counts`."""
        keys = colour_keys(rgb)
        ids = self.table[keys]
        unknown = ids == self.UNKNOWN
        if counts is not None:
            for key, pixels in zip(*np.unique(keys[unknown], return_counts=True), strict=True):
                colour = (int(key) >> 16, int(key) >> 8 & 255, int(key) & 255)
                counts[colour] = counts.get(colour, 0) + int(pixels)
        ids[unknown] = IGNORE
        return ids


def palette(colours: np.ndarray) -> np.ndarray:
    """(K,3) class colours -> (256,3) uint8: unused ids black, 255 (ignore) a neutral grey."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(colours)] = colours
    table[IGNORE] = 128
    return table


def save_label(path: Path, ids: np.ndarray, colours: np.ndarray) -> None:
    """Write (H,W) uint8 class ids as a palette PNG that opens in colour in any viewer."""
    image = Image.fromarray(np.ascontiguousarray(ids, np.uint8), mode="P")
    image.putpalette(palette(colours).tobytes())
    with write_whole(path) as temporary:
        image.save(temporary, format="PNG")


def resize_label(label: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """(H,W) -> (h,w) = size by the nearest pixel of index floor(i * H / h), as OpenCV's INTER_NEAREST in the release.

    The map becomes smaller: of each cell its upper left pixel stays.
    """
    rows, columns = (np.arange(cells) * length // cells for cells, length in zip(size, label.shape, strict=True))
    return label[rows[:, None], columns]


def load_label(path: Path, num_classes: int) -> np.ndarray:
    """Read (H,W) uint8 class ids.

    Raises `UserError` when the file cannot be read, is not one channel of 8 bits or a palette
    image, or holds an id that is neither a class nor 255.
    """
    with _png(path, "run the step that makes it again, or copy it there") as (image, bits):
        check(
            image.mode == "P" or (image.mode == "L" and bits == 8),
            f"{path} has mode {image.mode} and {bits} bits, so it is no map of class ids: make it with the scripts in "
            "datasetsprocess, which turn colours into ids, or save the ids as a palette PNG or a grey PNG of 8 bits",
        )
        ids = np.array(image)
    unknown = (ids >= num_classes) & (ids != IGNORE)
    if unknown.any():
        raise UserError(
            f"{path} holds the class id {ids[unknown][0]}, but there are {num_classes} classes (0 to "
            f"{num_classes - 1}, and 255 for ignore)"
        )
    return ids


def save_image(path: Path, rgb: np.ndarray) -> None:
    """Write (H,W,3) uint8 as PNG, by settings that are faster than Pillow's for photographs."""
    parameters = [
        *(cv2.IMWRITE_PNG_COMPRESSION, 1),
        *(cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE),
        *(cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_AVG),
    ]
    bgr = cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_RGB2BGR)
    _, png = cv2.imencode(".png", bgr, parameters)
    with write_whole(path) as temporary:
        temporary.write_bytes(png.tobytes())


def load_image(path: Path) -> np.ndarray:
    """Read a patch as (H,W,3) uint8; raises `UserError` unless it is an RGB PNG of 8 bits."""
    with _png(path, "cut the scenes again, or copy it there") as (image, bits):
        check(
            image.mode == "RGB" and bits == 8,
            f"{path} has mode {image.mode} and {bits} bits, but RGB of 8 bits is expected: convert it as "
            "docs/own_data.md says",
        )
        return np.array(image)


@contextmanager
def _png(path: Path, remedy: str) -> Iterator[tuple[Image.Image, int]]:
    """An open PNG and the bits of its channels, which Pillow would bring to 8.

    No other format, whatever the file's name: for an EPS, Pillow would start Ghostscript.
    """
    check(path.exists(), f"{path} is missing: {remedy}")
    check(path.is_file(), f"{path} is not a regular file: {remedy}")  # reading a named pipe would wait without end
    try:
        with path.open("rb") as file:
            header = file.read(25)  # its last byte holds the bits
            file.seek(0)
            with Image.open(file, formats=("PNG",)) as image:
                yield image, header[-1]
    except UnidentifiedImageError:  # its text names an object of Python
        raise UserError(
            f"{path} cannot be read as a PNG image (it is empty, damaged or of another format): {remedy}"
        ) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as a PNG image ({error}): {remedy}") from None
