"""Reading large scenes by windows, whatever their TIFF looks like inside."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from tools.command import UserError

SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg")
MAX_PIXELS = 1 << 29  # a scene of 23,000 x 23,000; a damaged or hostile header may promise far more
NODATA = 42113  # the TIFF tag in which GDAL names the value of pixels that are no image
KINDS = ("rgb", "grey", "palette")


class Raster:
    """An image file of `shape` (height, width) with 8-bit channels, read window by window.

    `kinds` are the images that are welcome: "rgb", "grey" (one channel, read as three equal ones), "palette" (indices,
    read like grey), and "holes" for images with pixels that are none, of which `valid` tells: those that an alpha
    channel makes wholly transparent, or whose channels all have the value `nodata` (-1: what the file names). An alpha
    channel that is opaque is dropped in any case.

    TIFFs are memory-mapped where they are not compressed; otherwise the strips or tiles that a window touches are
    decoded and kept until a window leaves them. PNG and JPEG know no windows and are held whole.
    Raises `UserError` for any other kind of image and for damaged files.
    """

    def __init__(self, path: Path, kinds: Sequence[str] = ("rgb",), nodata: int = -1):
        self.path, self.kinds, self.kind, self.palette = Path(path), kinds, "rgb", None
        self.nodata = None if nodata < 0 else nodata
        self._tiff, self._top = None, 0
        try:
            with self._decoding():
                if self.path.suffix.lower() in (".tif", ".tiff"):
                    self._open_tiff()
                else:
                    self._band = self._read_whole()
                    self.shape = self._band.shape[:2]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Raster":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and let go of the pixels; `shape` stays."""
        self._band = np.empty((0, 0, 3), np.uint8)
        if self._tiff:
            self._tiff.close()

    def read(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        """The window (height, width, 3) uint8 with upper left corner (y, x); it lies inside the image."""
        window = self._window(y, x, height, width)[..., :3]
        return window if window.shape[-1] == 3 else np.repeat(window, 3, axis=-1)

    def valid(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        """The pixels (height, width) bool of a window that are image: neither transparent nor nodata."""
        window = self._window(y, x, height, width)
        valid = np.ones((height, width), bool) if window.shape[-1] < 4 else window[..., 3] > 0
        if self.nodata is not None:
            valid &= (window[..., :3] != self.nodata).any(-1)
        return valid

    def tags(self, codes: Sequence[int]) -> list[tuple]:
        """Those of the TIFF tags that the file has, as tifffile writes them: (code, type, count, value, once)."""
        found = [self._page.tags.get(code) for code in codes] if self._tiff else []
        return [(tag.code, tag.dtype, tag.count, tag.value, True) for tag in found if tag]

    def _window(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        if y < self._top or y + height > self._top + len(self._band):
            with self._decoding():
                self._band = self._decode(y, y + height)
        window = self._band[y - self._top : y - self._top + height, x : x + width]
        if window.shape[-1] == 4:
            alpha, holes = window[..., 3], "holes" in self.kinds
            if not ((alpha == 255) | ((alpha == 0) & holes)).all():
                raise UserError(
                    f"{self.path} has a fourth channel that is no {'alpha of 0 and 255' if holes else 'opaque alpha'}, "
                    "but three of 8 bits are expected: choose channels with gdal_translate -b 1 -b 2 -b 3"
                )
        return window

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except FileNotFoundError:
            raise UserError(f"{self.path} is missing") from None
        except Exception as error:  # the decoders meet damaged files with many kinds of exception
            raise UserError(f"{self.path} cannot be read as an image ({error}): copy or unpack it anew") from None

    def _check(self, height: int, width: int, channels: int, bits: int) -> None:
        if height * width > MAX_PIXELS:
            raise UserError(
                f"{self.path} has {width} x {height} pixels, more than the {MAX_PIXELS:,} of the largest "
                "scene that is read: cut it into parts"
            )
        if bits == 8 and channels == 1 and self.kind == "palette" and "palette" not in self.kinds:
            raise UserError(f"{self.path} is a palette image: save it as an RGB image of 8 bits")
        if bits != 8 or channels != (3 if self.kind == "rgb" else 1) or self.kind not in self.kinds:
            found = f"{channels} channel{'s' * (channels != 1)} of {bits} bits"
            raise UserError(
                f"{self.path} has {found}, but three of 8 bits are expected: choose channels with "
                "gdal_translate -b 1 -b 2 -b 3 (-b 1 three times for a grey image), scale to 8 bits with "
                "-ot Byte -scale <darkest> <brightest> 0 255, the same for all scenes"
            )

    def _read_whole(self) -> np.ndarray:
        most, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # our own limit stands below
        try:
            image = Image.open(self.path)
        finally:
            Image.MAX_IMAGE_PIXELS = most
        with image:
            bits = 16 if "16" in str(image.tile[0][3]) or image.mode[0] in "IF" else 8  # Pillow would cut 16 bits to 8
            self.kind = {"P": "palette", "L": "grey"}.get(image.mode, "rgb")
            alpha = image.mode == "RGBA" and bits == 8
            self._check(image.height, image.width, 3 if alpha else len(image.getbands()), bits)
            if self.kind == "palette":
                colours = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
                self.palette = np.zeros((256, 3), np.uint8)
                self.palette[: len(colours)] = colours
            pixels = np.array(image if alpha or self.kind != "rgb" else image.convert("RGB"))
            return pixels.reshape(image.height, image.width, -1)

    def _open_tiff(self) -> None:
        self._tiff = tifffile.TiffFile(self.path)
        page = self._page = self._tiff.pages[0]
        self.shape = (page.imagelength, page.imagewidth)
        channels = self._channels = page.samplesperpixel
        if channels == 1:
            self.kind = "palette" if page.photometric == tifffile.PHOTOMETRIC.PALETTE else "grey"
        if self.kind == "palette" and page.colormap is not None and page.colormap.shape == (3, 256):
            self.palette = (page.colormap.T >> 8).astype(np.uint8)
        alpha = channels == 4 and page.extrasamples and page.extrasamples[0] in (1, 2)  # associated or not
        self._check(*self.shape, 3 if alpha else channels, 1 if page.dtype == bool else page.dtype.itemsize * 8)
        if self.nodata is None and NODATA in page.tags:
            self.nodata = _whole_number(page.tags[NODATA].value)
        self._planes = channels if page.planarconfig == 2 else 1  # channels interleaved, or plane behind plane
        self._chunk = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
        self._band = np.empty((0, 0, channels), np.uint8)
        if page.is_memmappable:
            mapped = tifffile.memmap(self.path, page=0, mode="r")
            mapped = np.moveaxis(mapped, 0, -1) if self._planes > 1 else mapped
            self._band = mapped.reshape(*self.shape, channels) if channels == 1 else mapped

    def _decode(self, start: int, stop: int) -> np.ndarray:
        """The rows of all strips or tiles that rows start to stop touch; sets the row where they begin."""
        (height, width), page, (rows, columns) = self.shape, self._page, self._chunk
        first, last, across = start // rows, -(-stop // rows), -(-width // columns)
        plane = -(-height // rows) * across
        indices = [p * plane + n for p in range(self._planes) for n in range(first * across, last * across)]
        offsets, sizes = ([values[i] for i in indices] for values in (page.dataoffsets, page.databytecounts))
        tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader} if page.compression in (6, 7) else {}
        band = np.empty((min(last * rows, height) - first * rows, width, self._channels), np.uint8)
        for data, index in self._tiff.filehandle.read_segments(offsets, sizes, indices):
            if not data or len(data) < page.databytecounts[index]:
                raise UserError(f"{self.path} ends too early: copy or unpack it anew")
            block = page.decode(data, index, **tables)[0][0]
            y, x = (index % plane // across - first) * rows, index % across * columns
            target = band[y : y + rows, x : x + columns]
            channels = slice(None) if self._planes == 1 else slice(index // plane, index // plane + 1)
            target[..., channels] = block[: target.shape[0], : target.shape[1]]
        self._top = first * rows
        return band


def _whole_number(text: str) -> int | None:
    """GDAL's nodata value where an 8-bit channel can have it."""
    try:
        number = float(text)
    except (TypeError, ValueError):
        return None
    return int(number) if number.is_integer() and 0 <= number <= 255 else None


def covering_starts(length: int, size: int, stride: int) -> list[int]:
    """Where windows begin that cover `length` pixels: every `stride`, and the last moved inward to end at the border.

    `stride` is at most `size`, and `size` at most `length`.
    """
    return [*range(0, length - size, stride), length - size]
