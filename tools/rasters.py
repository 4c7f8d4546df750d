"""Large scenes as files: images read by windows, and label maps that GIS programs open at the right place (GDAL)."""

import logging
import shutil
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import rasterio
from PIL import Image
from pydantic import Field
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import MemoryFile
from rasterio.windows import Window

from tools.command import UserError, check
from tools.files import write_whole
from tools.labels import IGNORE, palette

DRIVERS = {  # of GDAL, by suffix; each file is opened by its own driver alone, never as a VRT or a web address
    ".tif": "GTiff",
    ".tiff": "GTiff",
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jp2": "JP2OpenJPEG",
}
SUFFIXES = tuple(DRIVERS)
OPTIONS: dict[str, Any] = {
    "GDAL_CACHEMAX": 16 << 20,  # bytes; `Raster` keeps the rows that it needs itself
    "GDAL_JPEG_TO_RGB": "NO",  # a CMYK image is refused, not converted
    "GDAL_ERROR_ON_LIBJPEG_WARNING": "YES",  # an incomplete JPEG is refused, not filled up with grey
    "GDAL_PNG_WHOLE_IMAGE_OPTIM": "NO",  # it takes a PNG that ends too early for a whole one
    "CPL_VSIL_CURL_ALLOWED_EXTENSIONS": ".none",  # no file may refer to a web address
}
MAX_PIXELS = 1 << 29  # a scene of 23,000 x 23,000; a damaged or hostile header may promise far more
KINDS = ("rgb", "grey", "palette")
ORIENTATION = 274  # the tag of TIFF and EXIF that says how to turn an image
TILE = 256  # pixels a side of a written tile
LONGEST_NAME = 200  # bytes of a scene's name; results and temporary files add about 40, and file systems allow 255

Nodata = Annotated[int, Field(ge=-1, le=255)]  # -1: the nodata value stored in the file

logging.getLogger("rasterio").setLevel(logging.CRITICAL)  # what GDAL reports is part of our own messages


class Raster:
    """An image file of `shape` (height, width) with 8-bit channels, read window by window.

    `kinds` are the images that are accepted: "rgb", "grey" (one channel, read as three equal ones), "palette" (indices,
    read like grey), and "holes" for images with nodata pixels; see `valid`. `nodata` is the value of nodata pixels in
    all channels, -1 for the value stored in the file. An opaque alpha channel is dropped in any case.

    Only the rows of one window are held in memory, in full width; of a JPEG all rows. Windows that follow each other
    from top to bottom decode the file once. Raises `UserError` for any other image and for damaged files.
    """

    def __init__(self, path: Path, kinds: Sequence[str] = ("rgb",), nodata: int = -1):
        self.path, self.kinds = path, kinds
        self._top, self._band = 0, np.empty((0, 0, 3), np.uint8)
        with self._decoding():
            check_file(path)
            driver = DRIVERS.get(path.suffix.lower())
            check(driver is not None, f"{path} is not one of {', '.join(SUFFIXES)}: convert it with gdal_translate")
            self._file: Any = rasterio.open(path.absolute(), driver=driver)
            self._examine()
            stored = self._file.nodatavals[: self._colours] if nodata < 0 else [nodata]
            known = all(value in range(256) for value in stored)
            self._nodata = np.array(stored, np.uint8) if known else None

    def __enter__(self) -> "Raster":
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file and free the memory; `shape` stays."""
        self._band = self._band[:0, :0].copy()
        self._file.close()

    def read(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        """The window (height, width, 3) uint8 with upper left corner (y, x); it lies inside the image."""
        window = self._window(y, x, height, width)[..., : self._colours]
        return window if self._colours == 3 else np.repeat(window, 3, axis=-1)

    def valid(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        """Which pixels (height, width) bool of a window belong to the image.

        False where the alpha channel or the mask stored in the file says so, and where all channels have the nodata
        value.
        """
        window = self._window(y, x, height, width)
        valid = window[..., -1] > 0 if window.shape[-1] > self._colours else np.ones((height, width), bool)
        if self._nodata is not None:
            valid &= (window[..., : self._colours] != self._nodata).any(-1)
        return valid

    @property
    def place(self) -> dict[str, Any]:
        """The georeference as arguments of `label_tiff`; empty where the file has none."""
        with self._decoding():
            points, system = self._file.gcps
            if points:
                return {"gcps": points, "crs": system}
            transform = self._file.transform
            return {} if transform.is_identity else {"transform": transform, "crs": self._file.crs}

    @property
    def square_metres(self) -> float | None:
        """The area of a pixel, where the georeference has an equal scale everywhere; else None."""
        transform, system = self.place.get("transform"), self.place.get("crs")
        # Mercator's scale grows towards the poles: at 50 degrees, areas appear 2.4 times too large
        if not transform or not system or not system.is_projected or '["Mercator' in system.to_wkt():
            return None
        return abs(transform.determinant) * system.linear_units_factor[1] ** 2

    def _examine(self) -> None:
        """Check size and channels before any pixel is read; sets what is known of them."""
        file, path, kinds = self._file, self.path, self.kinds
        height, width = self.shape = file.shape
        check(
            height * width <= MAX_PIXELS,
            f"{path} has {width} x {height} pixels, but at most {MAX_PIXELS:,} are read: cut it into parts with "
            "gdal_translate -srcwin",
        )
        self._alpha = file.count > 1 and file.colorinterp[-1] == ColorInterp.alpha
        self._colours = file.count - self._alpha
        self.kind = {1: "grey", 3: "rgb"}.get(self._colours, "other")
        if file.colorinterp[0] == ColorInterp.palette:
            self.kind = "palette"
        check(
            self.kind != "palette" or "palette" in kinds,
            f"{path} is a palette image, but three channels of 8 bits are expected: gdal_translate -expand rgb",
        )
        bits = int(file.tags(1, ns="IMAGE_STRUCTURE").get("NBITS", 8 * np.dtype(file.dtypes[0]).itemsize))
        channels = f"{file.count} channel{'s' * (file.count != 1)} of {bits} bits"
        wrong = f"{path} has {channels}, but three of 8 bits are expected"
        check(
            set(file.dtypes) == {"uint8"} and (bits == 8 or self.kind == "palette"),
            f"{wrong}: scale it with gdal_translate -ot Byte -scale <darkest> <brightest> 0 255, with the same figures "
            "for all scenes",
        )
        check(
            self.kind != "grey" or "grey" in kinds,
            f"{wrong}: --grey repeat reads it as three equal channels; for a script without this constant, use "
            "gdal_translate -b 1 -b 1 -b 1",
        )
        check(self.kind in kinds, f"{wrong}: choose three with gdal_translate -b 1 -b 2 -b 3")
        self.palette: np.ndarray | None = None  # (256,3) uint8
        if self.kind == "palette":
            self.palette = np.zeros((256, 3), np.uint8)
            for index, colour in file.colormap(1).items():
                self.palette[index] = colour[:3]
        sidecar = path.with_name(path.name + ".msk")  # may be of any format, so GDAL must not open it
        may_have_mask = "holes" in kinds and not self._alpha and not sidecar.exists() and file.driver != "JPEG"
        self._masked = may_have_mask and file.mask_flag_enums[0] == [MaskFlags.per_dataset]
        turned = _orientation(path)
        check(
            turned == 1,
            f"{path} has the orientation {turned} in its EXIF or TIFF tags, which some programs apply and others "
            "ignore: save it upright with an image editor, or drop the tag with gdal_translate",
        )

    def _window(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        """(height, width, C) uint8: one or three colours, then alpha or mask where the file has it."""
        if y < self._top or y + height > self._top + len(self._band):
            with self._decoding():
                self._decode(y, y + height)
        window = self._band[y - self._top : y - self._top + height, x : x + width]
        if self._alpha:
            values, expected = ([0, 255], "alpha of 0 and 255") if "holes" in self.kinds else ([255], "opaque alpha")
            check(
                bool(np.isin(window[..., -1], values).all()),
                f"{self.path} has a channel that is no {expected}, but three of 8 bits are expected: choose channels "
                "with gdal_translate -b 1 -b 2 -b 3",
            )
        return window

    def _decode(self, start: int, stop: int) -> None:
        """Hold the rows start to stop, and those that GDAL decodes with them. Rows that are held already are kept."""
        height, width = self.shape
        block = self._file.block_shapes[0][0]
        if self._file.driver == "JPEG":
            # rasterio's wheels decode JPEG otherwise than Pillow, OpenCV and other builds of GDAL, by up to 16 grey
            # levels: patches would depend on the installation
            with _pillow(self.path) as image:
                self._band = np.asarray(image).reshape(height, width, -1)
            return
        bottom = self._top + len(self._band)
        held = self._band[start - self._top :] if self._top <= start < bottom else self._band[:0]
        first = bottom if len(held) else start // block * block
        last = min(-(-stop // block) * block, height)
        fresh = np.empty((last - first, width, self._colours + (self._alpha or self._masked)), np.uint8)
        channels = fresh[..., : self._file.count].transpose(2, 0, 1)
        window = Window(0, first, width, last - first)
        self._file.read(out=channels, window=window)
        if self._masked:
            fresh[..., -1] = self._file.read_masks(1, window=window)
        self._top = first - len(held)
        self._band = np.concatenate([held, fresh]) if len(held) else fresh

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        """What GDAL raises inside becomes one sentence."""
        try:
            with gdal():
                yield
        except (UserError, MemoryError):
            raise
        except Exception as error:  # GDAL reports damaged files by many kinds of exception
            reason = str(error.__cause__ or error).removeprefix(f"{self.path.absolute()}: ")[:200]
            raise UserError(f"{self.path} cannot be read as an image ({reason}): copy or export it again") from None


@contextmanager
def gdal() -> Iterator[None]:
    """GDAL with our options, silent about images without a georeference."""
    with rasterio.Env(**OPTIONS), warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


def check_file(path: Path) -> None:
    """Raise `UserError` unless `path` is a file that can be read in any order; never opens it."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # also for a name that no file can have
        raise UserError(f"{path} is missing") from None
    check(not stat.S_ISDIR(mode), f"{path} is a folder: name its files, such as {path / '*.tif'}")
    check(stat.S_ISREG(mode), f"{path} is not a regular file: copy its content to one")


@contextmanager
def _pillow(path: Path) -> Iterator[Image.Image]:
    """The image as Pillow opens it, silent about odd tags and without Pillow's limit of pixels: ours is checked."""
    most, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=("TIFF", "JPEG", "MPO")) as image:
            yield image
    finally:
        Image.MAX_IMAGE_PIXELS = most


def _orientation(path: Path) -> int:
    """How the image must be turned: 1 for not at all, 2 to 8 as EXIF numbers the ways. GDAL is silent on TIFFs."""
    try:
        with _pillow(path) as image:
            turned = image.getexif().get(ORIENTATION, 1)
    except Exception:  # a header that Pillow does not understand
        return 1
    return turned if turned in range(2, 9) else 1


def covering_starts(length: int, size: int, stride: int) -> list[int]:
    """Where windows begin that cover `length` pixels: every `stride`, the last one moved inward to end at the border.

    `stride` is at most `size`, and `size` at most `length`.
    """
    return [*range(0, length - size, stride), length - size]


@contextmanager
def label_tiff(
    path: Path, shape: tuple[int, int], colours: np.ndarray, place: dict[str, Any]
) -> Iterator[Callable[[np.ndarray], None]]:
    """Yield `write(strip)`, which takes the strips (h,W) uint8 of a label map from top to bottom.

    At the end of the block they become a compressed GeoTIFF in tiles, in the classes' colours, nodata 255. `place` is a
    `Raster.place`. The compressed file is held in memory, the label map is not: GDAL would not report a full disk.
    """
    height, width = shape
    profile = {"driver": "GTiff", "height": height, "width": width, "count": 1, "dtype": "uint8", "nodata": IGNORE}
    tiles = {"tiled": True, "blockxsize": TILE, "blockysize": TILE, "compress": "deflate"}
    with gdal(), MemoryFile() as memory:
        with memory.open(**profile, **tiles, **place) as file:
            file.write_colormap(1, dict(enumerate(map(tuple, palette(colours).tolist()))))
            top = 0

            def write(strip: np.ndarray) -> None:
                nonlocal top
                file.write(strip, 1, window=Window(0, top, width, len(strip)))
                top += len(strip)

            yield write
        with write_whole(path) as temporary:
            temporary.write_bytes(memory.getbuffer())


def copy_world_file(image: Path, target: Path) -> None:
    """Copy the text file beside an image that places it on a map (.tfw, .pgw, .jgw, ...), under the result's name."""

    def names(path: Path) -> list[Path]:
        suffix = path.suffix
        return [path.with_suffix(ending) for ending in (suffix[:2] + suffix[-1] + "w", suffix + "w", ".wld")]

    for file in names(image):
        if file.is_file():
            with write_whole(names(target)[0]) as temporary:
                shutil.copyfile(file, temporary)
            return
