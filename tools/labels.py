"""Label maps: class ids in palette PNGs, and the exact way from colours to ids and back."""

from pathlib import Path

import imagecodecs
import numpy as np
from PIL import Image

from tools.command import UserError
from tools.files import write_whole

IGNORE = 255


def colour_keys(rgb: np.ndarray) -> np.ndarray:
    """(..., 3) uint8 colours -> (...) int32 keys R<<16 | G<<8 | B."""
    rgb = rgb.astype(np.int32)
    return rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]


class ColourDecoder:
    """Colours to class ids by a look-up table of all 2^24 colours: exact, unknown colours never become a class.

    `colours` (K,3) uint8 in the order of the ids; `ignore_colours` (J,3) become 255.
    """

    UNKNOWN = 254

    def __init__(self, colours: np.ndarray, ignore_colours: np.ndarray):
        self.table = np.full(1 << 24, self.UNKNOWN, np.uint8)
        if len(ignore_colours):
            self.table[colour_keys(np.asarray(ignore_colours, np.uint8))] = IGNORE
        self.table[colour_keys(np.asarray(colours, np.uint8))] = np.arange(len(colours))

    def __call__(self, rgb: np.ndarray, counts: dict[tuple[int, int, int], int] | None = None) -> np.ndarray:
        """(H,W,3) uint8 -> (H,W) uint8 ids. Unknown colours become 255 and their pixels are added to `counts`."""
        keys = colour_keys(rgb)
        ids = self.table[keys]
        unknown = ids == self.UNKNOWN
        if unknown.any():
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


def load_label(path: Path, num_classes: int) -> np.ndarray:
    """Read (H,W) uint8 class ids.

    Raises `UserError` when the file cannot be read, is not one 8-bit channel, or holds an id that is neither a class
    nor 255.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L"):
                raise UserError(
                    f"{path} is a {image.mode} image, not a map of class ids: make it with the scripts in "
                    "datasetsprocess, which turn colours into ids, or save the ids as an 8-bit grey or palette PNG"
                )
            ids = np.array(image)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: copy it there, or run again the step that makes it") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image ({error}): copy or make it anew") from None
    wrong = (ids >= num_classes) & (ids != IGNORE)
    if wrong.any():
        raise UserError(
            f"{path} holds the class id {ids[wrong][0]}, but there are {num_classes} classes (0 to "
            f"{num_classes - 1}, and 255 for ignore)"
        )
    return ids


def save_image(path: Path, rgb: np.ndarray) -> None:
    """Write (H,W,3) uint8 as PNG. Filter and strategy suit photographs: far faster than Pillow, files no larger."""
    png = imagecodecs.png_encode(
        np.ascontiguousarray(rgb), level=1, strategy=imagecodecs.PNG.STRATEGY.RLE, filter=imagecodecs.PNG.FILTER.AVG
    )
    with write_whole(path) as temporary:
        temporary.write_bytes(png)


def load_image(path: Path) -> np.ndarray:
    """Read an 8-bit RGB image as (H,W,3) uint8; raises `UserError` when it is damaged or has other channels."""
    try:
        with Image.open(path) as image:
            if image.mode != "RGB":
                raise UserError(
                    f"{path} has mode {image.mode}, not 8-bit RGB: convert it to three 8-bit channels "
                    "(docs/own_data.md says how)"
                )
            return np.array(image)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: copy it there, or cut the scenes again") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image ({error}): copy or make it anew") from None
