"""Reading large scenes by windows, whatever their TIFF looks like inside."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from tools.command import UserError

SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg")
MAX_PIXELS = 1 << 29  # a scene of 23,000 x 23,000; a damaged or hostile header may promise far more


class Raster:
    """An image file of `shape` (height, width) with three 8-bit channels, read window by window.

    TIFFs are memory-mapped where they are not compressed; otherwise the strips or tiles that a window touches are
    decoded and kept until a window leaves them. PNG and JPEG know no windows and are held whole. A PNG's alpha channel
    is dropped when it is opaque everywhere. Raises `UserError` for any other kind of image and for damaged files.
    """

    def __init__(self, path: Path):
        self.path, self._tiff, self._top = Path(path), None, 0
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
        if y < self._top or y + height > self._top + len(self._band):
            with self._decoding():
                self._band = self._decode(y, y + height)
        return self._band[y - self._top : y - self._top + height, x : x + width]

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
        if channels != 3 or bits != 8:
            found = f"{channels} channel{'s' * (channels != 1)} of {bits} bits"
            raise UserError(
                f"{self.path} has {found}, but three of 8 bits are expected: choose channels with "
                "gdal_translate -b 1 -b 2 -b 3 (-b 1 three times for a grey image), scale to 8 bits with "
                "-ot Byte -scale; a truth must be colour-coded"
            )

    def _read_whole(self) -> np.ndarray:
        with Image.open(self.path) as image:
            bits = 16 if "16" in str(image.tile[0][3]) or image.mode[0] in "IF" else 8  # Pillow would cut 16 bits to 8
            if image.mode == "P":
                raise UserError(f"{self.path} is a palette image: save it as an RGB image of 8 bits")
            opaque = image.mode == "RGBA" and bits == 8 and image.getextrema()[3] == (255, 255)
            self._check(image.height, image.width, 3 if opaque else len(image.getbands()), bits)
            return np.array(image.convert("RGB"))

    def _open_tiff(self) -> None:
        self._tiff = tifffile.TiffFile(self.path)
        page = self._page = self._tiff.pages[0]
        self.shape = (page.imagelength, page.imagewidth)
        self._check(*self.shape, page.samplesperpixel, 1 if page.dtype == bool else page.dtype.itemsize * 8)
        self._planes = 3 if page.planarconfig == 2 else 1  # channels interleaved, or one plane behind the other
        self._chunk = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
        self._band = np.empty((0, 0, 3), np.uint8)
        if page.is_memmappable:
            mapped = tifffile.memmap(self.path, page=0, mode="r")
            self._band = np.moveaxis(mapped, 0, -1) if self._planes == 3 else mapped

    def _decode(self, start: int, stop: int) -> np.ndarray:
        """The rows of all strips or tiles that rows start to stop touch; sets the row where they begin."""
        (height, width), page, (rows, columns) = self.shape, self._page, self._chunk
        first, last, across = start // rows, -(-stop // rows), -(-width // columns)
        plane = -(-height // rows) * across
        indices = [p * plane + n for p in range(self._planes) for n in range(first * across, last * across)]
        offsets, sizes = ([values[i] for i in indices] for values in (page.dataoffsets, page.databytecounts))
        tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader} if page.compression in (6, 7) else {}
        band = np.empty((min(last * rows, height) - first * rows, width, 3), np.uint8)
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
