"""GeoTIFFs and PNGs for the tests, and noise to put into them."""

import struct
import zlib
from pathlib import Path

import numpy as np
import rasterio
from rasterio.transform import from_origin

from tools.rasters import gdal

UTM = {"crs": "EPSG:32632", "transform": from_origin(500_000, 5_400_000, 0.5, 0.5)}  # half a metre a pixel


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def write_tif(
    path: Path, pixels: np.ndarray, colormap: dict | None = None, mask: np.ndarray | None = None, **profile
) -> Path:
    """(H,W) or (H,W,C) as a GeoTIFF; a fourth channel is alpha where the profile says so, `mask` is stored inside."""
    bands = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
    profile = {"driver": "GTiff", "compress": "deflate", "dtype": pixels.dtype} | profile
    size = dict(zip(("count", "height", "width"), bands.shape, strict=True))
    with gdal(), rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "w", **profile, **size) as file:
        file.write(bands)
        if colormap:
            file.write_colormap(1, colormap)
        if mask is not None:
            file.write_mask(mask)
    return path


def png(width: int, height: int, bits: int, kind: int, rows: bytes) -> bytes:
    """A PNG file by the standard, so that a test may choose what no library writes. `kind` 0: grey, 2: RGB."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


GIANT_PNG = png(100_000, 100_000, 8, 2, b"\0")  # a hundred bytes that promise 100,000 x 100,000 pixels
