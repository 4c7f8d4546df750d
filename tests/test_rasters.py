"""Reading scenes by windows: every TIFF layout, png and jpg, and files that are no scene."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from tools.command import UserError
from tools.rasters import Raster


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"compression": "lzw", "rowsperstrip": 1},
        {"compression": "lzw", "rowsperstrip": 37},
        {"compression": "zlib"},
        {"compression": "lzw", "predictor": True, "rowsperstrip": 5},
        {"tile": (32, 48), "compression": "lzw"},
        {"tile": (16, 16)},
        {"planarconfig": "separate"},
        {"planarconfig": "separate", "compression": "lzw", "rowsperstrip": 7},
        {"planarconfig": "separate", "tile": (32, 16), "compression": "zlib"},
        {"byteorder": ">", "rowsperstrip": 3},
    ],
    ids=lambda layout: "-".join(map(str, layout.values())) or "plain",
)
def test_windows_of_every_tiff_layout(tmp_path, layout):
    image = np.random.default_rng(0).integers(0, 256, (101, 83, 3)).astype(np.uint8)
    stored = np.moveaxis(image, -1, 0) if layout.get("planarconfig") == "separate" else image
    tifffile.imwrite(tmp_path / "scene.tif", stored, photometric="rgb", **layout)
    with Raster(tmp_path / "scene.tif") as raster:
        assert raster.shape == (101, 83)
        for y, x, height, width in ((0, 0, 16, 16), (16, 60, 16, 23), (85, 67, 16, 16), (3, 1, 90, 5), (0, 0, 101, 83)):
            np.testing.assert_array_equal(raster.read(y, x, height, width), image[y : y + height, x : x + width])


def test_png_with_opaque_alpha_and_jpg(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 4)).astype(np.uint8)
    image[..., 3] = 255
    Image.fromarray(image).save(tmp_path / "a.png")
    Image.fromarray(image[..., :3]).save(tmp_path / "b.jpg")
    with Raster(tmp_path / "a.png") as raster:
        np.testing.assert_array_equal(raster.read(0, 0, 20, 30), image[..., :3])
    with Raster(tmp_path / "b.jpg") as raster:
        np.testing.assert_array_equal(raster.read(2, 3, 8, 8), np.array(Image.open(tmp_path / "b.jpg"))[2:10, 3:11])


def spoil(path: Path, how: str) -> None:
    random = np.random.default_rng(0)
    rgb = random.integers(0, 256, (64, 64, 3)).astype(np.uint8)
    if how == "grey":
        Image.fromarray(rgb[..., 0]).save(path)
    elif how == "16 bit":
        cv2.imwrite(str(path), rgb.astype(np.uint16) * 257)
    elif how == "four bands":
        Image.fromarray(np.dstack([rgb, rgb[..., :1]])).save(path)
    elif how == "palette":
        Image.fromarray(rgb).quantize(8).save(path)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("not found")
    elif how == "short":
        Image.fromarray(rgb).save(path, **({"compression": "tiff_lzw"} if path.suffix == ".tif" else {}))
        path.write_bytes(path.read_bytes()[: 3 * path.stat().st_size // 5])


@pytest.mark.parametrize("suffix", [".tif", ".png"])
@pytest.mark.parametrize("how", ["grey", "16 bit", "four bands", "palette", "empty", "text", "short", "missing"])
def test_other_images_are_refused_by_name(tmp_path, suffix, how):
    path = tmp_path / f"scene{suffix}"
    spoil(path, how)
    with pytest.raises(UserError, match=f"scene{suffix} (has|is|cannot|ends)"), Raster(path) as raster:
        raster.read(0, 0, 64, 64)


def test_short_tiff_with_its_header_in_front(tmp_path):
    path = tmp_path / "scene.tif"
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    for options, sentence in (({"compression": "lzw", "rowsperstrip": 4}, "ends too early"), ({}, "cannot be read")):
        tifffile.imwrite(path, image, **options)
        path.write_bytes(path.read_bytes()[:-500])
        with pytest.raises(UserError, match=f"scene.tif {sentence}"), Raster(path) as raster:
            raster.read(0, 0, 64, 64)


def test_gigantic_header_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "bomb.tif", np.zeros((8, 8, 3), np.uint8), compression="zlib")
    with tifffile.TiffFile(tmp_path / "bomb.tif", mode="r+") as tiff:
        for tag in ("ImageWidth", "ImageLength", "RowsPerStrip"):
            tiff.pages[0].tags[tag].overwrite(100_000)
    with pytest.raises(UserError, match="100000 x 100000 pixels"):
        Raster(tmp_path / "bomb.tif")
