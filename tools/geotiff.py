"""Writing label maps that GIS programs open at the right place, in the classes' colours."""

import shutil
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import tifffile

from tools.files import write_whole
from tools.labels import IGNORE, palette
from tools.rasters import NODATA

# GeoTIFF's tags: pixel scale, tie points, transformation; the coordinate system's keys, their numbers, their texts
GEOREFERENCE = (33550, 33922, 34264, 34735, 34736, 34737)
TILE = 256  # pixels a side of a tile


def write_tiff(
    path: Path, strips: Iterable[np.ndarray], shape: tuple[int, int], colours: np.ndarray, tags: list[tuple]
) -> None:
    """Write strips (h,W) uint8 of class ids as a compressed TIFF in tiles with colour table and nodata 255.

    `tags` are written along, such as the georeference of the image. The scene is never held whole.
    """
    with write_whole(path) as temporary:
        tifffile.imwrite(
            temporary,
            _tiles(strips, shape[1]),
            shape=shape,
            dtype=np.uint8,
            tile=(TILE, TILE),
            photometric="palette",
            colormap=palette(colours).T.astype(np.uint16) * 257,  # 8 bits to 16
            compression="zlib",
            extratags=[*tags, (NODATA, "s", 0, str(IGNORE), True)],
            metadata=None,
            maxworkers=1,  # with more, all tiles are gathered first
        )


def _tiles(strips: Iterable[np.ndarray], width: int) -> Iterator[np.ndarray]:
    """Whole tiles from left to right and top to bottom, filled up with 255."""
    across = -(-width // TILE)
    waiting = np.empty((0, width), np.uint8)
    for strip in chain(strips, [None]):
        if strip is not None:
            waiting = np.concatenate([waiting, strip])
        while len(waiting) >= TILE or (strip is None and len(waiting)):
            row, waiting = waiting[:TILE], waiting[TILE:]
            row = np.pad(row, ((0, TILE - len(row)), (0, across * TILE - width)), constant_values=IGNORE)
            yield from (np.ascontiguousarray(tile) for tile in np.split(row, across, axis=1))


def copy_world_file(image: Path, target: Path) -> None:
    """Copy the text file beside an image that places it on a map (.tfw, .pgw, .jgw, ...), under the result's name."""

    def names(path: Path) -> list[Path]:
        return [
            path.with_suffix(suffix) for suffix in (path.suffix[:2] + path.suffix[-1] + "w", path.suffix + "w", ".wld")
        ]

    for file in names(image):
        if file.is_file():
            with write_whole(names(target)[0]) as temporary:
                shutil.copyfile(file, temporary)
            return
