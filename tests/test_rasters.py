"""Scenes read by windows: every layout, channels, nodata, files that are no scene, and label maps written in place."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.transform import from_origin

from tests.conftest import ROOT, TINY_COLOURS
from tests.tiffs import GIANT_PNG, UTM, noise, write_tif
from tools.command import UserError
from tools.rasters import MAX_PIXELS, Raster, copy_world_file, gdal, label_tiff


def refused(words: str):
    return pytest.raises(UserError, match=words)


def pixels_of(path: Path, *arguments) -> np.ndarray:
    with Raster(path, *arguments) as raster:
        return raster.read(0, 0, *raster.shape)


# layouts -----------------------------------------------------------------------------------------------------------


WINDOWS = [(0, 0, 16, 16), (16, 60, 16, 23), (85, 67, 16, 16), (3, 1, 90, 5), (20, 0, 16, 83), (0, 0, 101, 83)]


@pytest.mark.parametrize(
    "layout",
    [
        {"compress": "none"},
        {"compress": "lzw", "blockysize": 1},
        {"compress": "deflate", "predictor": 2, "blockysize": 37},
        {"compress": "zstd", "blockysize": 101},
        {"compress": "lzw", "tiled": True, "blockxsize": 48, "blockysize": 32},
        {"compress": "none", "interleave": "band"},
        {"compress": "deflate", "interleave": "band", "tiled": True, "blockxsize": 16, "blockysize": 32},
    ],
    ids=lambda layout: "-".join(map(str, layout.values())),
)
def test_windows_of_every_tiff_layout(tmp_path, layout):
    image = noise(101, 83)
    with Raster(write_tif(tmp_path / "scene.tif", image, **layout)) as raster:
        assert raster.shape == (101, 83)
        for y, x, height, width in WINDOWS:
            np.testing.assert_array_equal(raster.read(y, x, height, width), image[y : y + height, x : x + width])


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".jpg", ".JPEG", ".jp2", ".TIF", ".tiff"])
def test_windows_of_every_format(tmp_path, suffix):
    path = tmp_path / f"scene{suffix}"
    Image.fromarray(noise(101, 83)).save(path)
    image = np.array(Image.open(path))  # as Pillow, OpenCV and torchvision decode a JPEG
    with Raster(path) as raster:
        for y, x, height, width in WINDOWS:
            np.testing.assert_array_equal(raster.read(y, x, height, width), image[y : y + height, x : x + width])


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured by Linux's /proc")
@pytest.mark.parametrize("rows", [16, 10_000])
def test_memory_is_that_of_a_few_rows(tmp_path, rows):
    """A scene of 60 MB, in many strips or in one: the process that reads it grows by two thirds of it at most."""
    path = write_tif(tmp_path / "a.tif", np.zeros((10_000, 2000, 3), np.uint8), compress="lzw", blockysize=rows)
    program = """if True:
        import sys
        from pathlib import Path
        from tools.rasters import Raster

        def memory(line):
            return int(Path("/proc/self/status").read_text().split(line + ":")[1].split()[0])

        before = memory("VmRSS")
        with Raster(Path(sys.argv[1])) as raster:
            for y in range(0, 9_900, 192):
                raster.read(y, 0, 100, 100)
        print(memory("VmHWM") - before)
    """
    grown = subprocess.run([sys.executable, "-c", program, path], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(grown.stdout) * 1024 < 42e6


# channels and nodata -----------------------------------------------------------------------------------------------


def rgba(alpha) -> np.ndarray:
    return np.dstack([noise(20, 30), np.broadcast_to(np.asarray(alpha, np.uint8), (20, 30))])


ALPHA = {"photometric": "rgb", "alpha": "yes"}


def test_alpha_is_dropped_where_it_is_opaque(tmp_path):
    opaque, holes = rgba(255), rgba(np.where(np.arange(30) < 9, 0, 255))
    Image.fromarray(opaque).save(tmp_path / "a.png")
    write_tif(tmp_path / "a.tif", opaque, **ALPHA)
    write_tif(tmp_path / "b.tif", holes, **ALPHA)
    for name in ("a.png", "a.tif"):
        np.testing.assert_array_equal(pixels_of(tmp_path / name), opaque[..., :3])
    with Raster(tmp_path / "b.tif", ("rgb", "holes")) as raster:
        np.testing.assert_array_equal(raster.valid(3, 2, 10, 20), np.arange(2, 22) >= np.full((10, 1), 9))
    with refused("b.tif has a channel that is no opaque alpha"):
        pixels_of(tmp_path / "b.tif")
    write_tif(tmp_path / "c.tif", rgba(noise(20, 30)[..., 0]), **ALPHA)
    with refused("c.tif .*alpha of 0 and 255.*gdal_translate"):
        pixels_of(tmp_path / "c.tif", ("rgb", "holes"))


@pytest.mark.parametrize(
    ("stored", "constant", "columns"),
    [
        ("9", -1, 9),
        ("", -1, 0),
        ("", 9, 9),
        ("7", 9, 9),  # the constant counts
        ("-9999", -1, 0),  # no 8-bit pixel has this value
        ("nan", -1, 0),
    ],
)
def test_nodata_of_the_file_and_of_the_constant(tmp_path, stored, constant, columns):
    image = noise(20, 30) // 2 + 100
    image[:, :9] = 9
    image[5, 20, 0] = 9  # one channel alone is no nodata
    tags = {42113: stored} if stored else {}  # as other programs write it: a text, which need not be 8 bits
    Image.fromarray(image).save(tmp_path / "a.tif", tiffinfo=tags)
    with Raster(tmp_path / "a.tif", ("rgb", "holes"), constant) as raster:
        valid = raster.valid(0, 0, 20, 30)
    np.testing.assert_array_equal(valid, np.arange(30) >= np.full((20, 1), columns))


def test_a_mask_inside_the_file_marks_nodata(tmp_path):
    mask = np.broadcast_to(np.where(np.arange(30) < 9, 0, 255), (20, 30)).astype(np.uint8)
    path = write_tif(tmp_path / "a.tif", noise(20, 30), mask=mask)
    with Raster(path, ("rgb", "holes")) as raster:
        np.testing.assert_array_equal(raster.valid(0, 0, 20, 30), mask > 0)
        np.testing.assert_array_equal(raster.read(0, 0, 20, 30), noise(20, 30))
    np.testing.assert_array_equal(pixels_of(path), noise(20, 30))


def test_grey_and_palette(tmp_path):
    grey, colours = noise(20, 30)[..., 0] % 4, [(9, 8, 7), (255, 0, 1), (0, 3, 0), (4, 4, 4)]
    palette = Image.fromarray(grey, "P")
    palette.putpalette(sum(colours, ()))
    write_tif(tmp_path / "p.tif", grey, dict(enumerate(colours)))
    for name in ("p.png", "q.tif"):
        palette.save(tmp_path / name)
    for name in ("p.tif", "p.png", "q.tif"):
        with Raster(tmp_path / name, ("palette",)) as raster:
            np.testing.assert_array_equal(raster.read(0, 0, 20, 30)[..., 1], grey)
            assert raster.kind == "palette" and list(map(tuple, raster.palette[:4].tolist())) == colours
        with refused(rf"{name} is a palette image.*gdal_translate"):
            Raster(tmp_path / name)
    write_tif(tmp_path / "wide.tif", grey.astype(np.uint16), dict(enumerate(colours)), photometric="palette")
    with refused("wide.tif has 1 channel of 16 bits"):
        Raster(tmp_path / "wide.tif", ("palette",))
    for name in ("g.png", "g.tif"):
        Image.fromarray(grey).save(tmp_path / name)
        np.testing.assert_array_equal(pixels_of(tmp_path / name, ("grey",)), np.dstack([grey] * 3))
        with refused(rf"{name} has 1 channel of 8 bits, .*--grey repeat"):
            Raster(tmp_path / name)


# files that are no scene -------------------------------------------------------------------------------------------


def spoil(path: Path, how: str) -> None:
    rgb = noise(64, 64)
    if how == "16 bit":
        cv2.imwrite(str(path), rgb.astype(np.uint16) * 257)
    elif how == "four bands":
        Image.fromarray(np.dstack([rgb, rgb[..., :1]])).save(path)
    elif how == "1 bit":
        Image.fromarray(rgb[..., 0] > 99).save(path)
    elif how == "cmyk":
        Image.fromarray(rgb).convert("CMYK").save(path)
    elif how == "text":
        path.write_text("not found")
    elif how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how != "missing":  # layouts of a TIFF that ends too early
        layouts = {
            "strips": {"compress": "lzw", "blockysize": 4},
            "plain": {"compress": "none"},
            "jpeg": {"compress": "jpeg", "photometric": "ycbcr", "blockysize": 64},
        }
        write_tif(path, rgb, **layouts[how])
        assert pixels_of(path).shape == (64, 64, 3)
        path.write_bytes(path.read_bytes()[:-1500])


@pytest.mark.parametrize(
    ("suffix", "how", "words"),
    [
        *((suffix, "16 bit", "3 channels of 16 bits.*-ot Byte -scale") for suffix in (".tif", ".png")),
        *((suffix, "four bands", "(4 channels|opaque alpha).*-b 1 -b 2 -b 3") for suffix in (".tif", ".png")),
        *((suffix, "1 bit", "(1 channel of 1 bits|palette)") for suffix in (".tif", ".png")),
        (".jpg", "cmyk", "4 channels of 8 bits"),
        (".tif", "text", "cannot be read as an image"),
        (".tif", "folder", "is a folder"),
        (".tif", "pipe", "not a regular file"),
        (".tif", "missing", "is missing"),
        *((".tif", how, "cannot be read as an image") for how in ("strips", "plain", "jpeg")),
    ],
)
def test_other_images_are_refused_by_name(tmp_path, suffix, how, words):
    path = tmp_path / f"scene{suffix}"
    spoil(path, how)
    with refused(f"scene{suffix} .*{words}"):
        pixels_of(path)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jp2"])
def test_a_cut_file_is_refused_at_every_length(tmp_path, suffix):
    path = tmp_path / f"cut{suffix}"
    Image.fromarray(noise(40, 40)).save(path)
    content = path.read_bytes()
    for length in range(0, len(content) - 40, 97):  # the last bytes carry no pixel
        path.write_bytes(content[:length])
        with refused(f"cut{suffix} cannot be read as an image"):
            pixels_of(path)


@pytest.mark.parametrize("side", [100_000, 23_171])
def test_a_gigantic_image_is_refused(tmp_path, side):
    assert side**2 > MAX_PIXELS
    profile = {"driver": "GTiff", "count": 3, "dtype": "uint8", "tiled": True, "blockxsize": 4096, "blockysize": 4096}
    with gdal():  # no tile is written, so that the file is small
        rasterio.open(tmp_path / "a.tif", "w", width=side, height=side, sparse_ok=True, **profile).close()
    with refused(f"a.tif has {side} x {side} pixels"):
        Raster(tmp_path / "a.tif")
    (tmp_path / "a.png").write_bytes(GIANT_PNG)
    with refused("a.png (has 100000 x 100000 pixels|cannot be read)"):
        Raster(tmp_path / "a.png")


@pytest.mark.parametrize("orientation", [0, 1, 2, 8])
@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_an_image_that_must_be_turned_is_refused(tmp_path, suffix, orientation):
    path, exif = tmp_path / f"turned{suffix}", Image.Exif()
    exif[274] = orientation
    Image.fromarray(noise(20, 30)).save(path, exif=exif, tiffinfo={274: orientation})
    if orientation < 2:
        assert pixels_of(path).shape == (20, 30, 3)
    else:
        with refused(f"turned{suffix} has the orientation {orientation}"):
            Raster(path)


def vrt(source: str) -> str:
    band = f"<SimpleSource><SourceFilename>{source}</SourceFilename><SourceBand>1</SourceBand></SimpleSource>"
    bands = "".join(f'<VRTRasterBand dataType="Byte" band="{n}">{band}</VRTRasterBand>' for n in (1, 2, 3))
    return f'<VRTDataset rasterXSize="30" rasterYSize="20">{bands}</VRTDataset>'


def test_no_vrt_and_no_web_address_is_opened(tmp_path, monkeypatch):
    """Neither by its name, nor under the name of an image, nor as a mask that GDAL finds beside an image."""
    monkeypatch.setenv("GDAL_HTTP_TIMEOUT", "2")  # nobody answers
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"/vsicurl/http://127.0.0.1:{server.getsockname()[1]}/x.tif"
        image = write_tif(tmp_path / "image.tif", noise(20, 30))
        for file in ("named.tif", "named.vrt", "named.png", "image.tif.msk", "image.tif.ovr"):
            (tmp_path / file).write_text(vrt(address))
        for path in (Path(address), tmp_path / "named.tif", tmp_path / "named.vrt", tmp_path / "named.png"):
            with refused("(is missing|is not one of|cannot be read)"):
                pixels_of(path, ("rgb", "grey", "palette", "holes"))
        (tmp_path / "local.tif").write_text(vrt(str(image)))
        with refused("local.tif cannot be read as an image"):
            Raster(tmp_path / "local.tif")
        with Raster(image, ("rgb", "holes")) as raster:
            assert raster.valid(0, 0, 20, 30).all()
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):  # nobody has asked
            server.accept()


FUZZ = """
import sys
from pathlib import Path
import numpy as np

from tools.command import UserError
from tools.rasters import KINDS, Raster

folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
random, read = np.random.default_rng(0), 0
files = sorted(path for path in folder.iterdir())
for round in range(rounds):
    source = files[round % len(files)]
    content = bytearray(source.read_bytes())
    if random.random() < 0.2:
        content = content[: random.integers(len(content))]
    for _ in range(random.integers(0, 6)):
        place = random.integers(len(content)) if random.random() < 0.3 else random.integers(min(len(content), 400))
        content[place : place + 1] = random.bytes(1) if random.random() < 0.8 else b""
        if not content:
            break
    path = folder.parent / f"fuzz{source.suffix}"
    path.write_bytes(content)
    try:
        with Raster(path, (*KINDS, "holes")) as raster:
            height, width = raster.shape
            assert min(height, width) > 0
            if height * width < 1 << 20:
                assert raster.read(0, 0, height, width).shape == (height, width, 3)
                assert raster.valid(0, 0, height, width).dtype == bool
                raster.place, raster.square_metres
                read += 1
    except UserError as error:
        assert str(path) in str(error), error
print(read)
"""


def test_broken_files_are_refused_or_read(tmp_path):
    """Files cut or changed anywhere, 600 of them: no other exception than UserError, and nothing on the terminal."""
    folder = tmp_path / "good"
    folder.mkdir()
    image = noise(40, 48) // 16
    for name, layout in (
        ("strips", {"compress": "lzw", "blockysize": 5, **UTM}),
        ("tiles", {"compress": "deflate", "tiled": True, "blockxsize": 16, "blockysize": 16}),
        ("planes", {"compress": "none", "interleave": "band"}),
        ("jpeg", {"compress": "jpeg", "photometric": "ycbcr"}),
    ):
        write_tif(folder / f"{name}.tif", image, nodata=0, **layout)
    write_tif(folder / "palette.tif", image[..., 0] % 4, {0: (1, 2, 3), 3: (9, 9, 9)})
    Image.fromarray(image).save(folder / "rgb.png")
    Image.fromarray(np.dstack([image, np.full((40, 48), 255, np.uint8)])).save(folder / "alpha.png")
    Image.fromarray(image).quantize(8).save(folder / "palette.png")
    Image.fromarray(image).save(folder / "a.jpg")
    Image.fromarray(image).save(folder / "a.jp2")
    command = [sys.executable, "-X", "faulthandler", "-c", FUZZ, folder, "600"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and result.stderr == "", result.stderr[-3000:]
    assert 50 < int(result.stdout) < 550


# georeference ------------------------------------------------------------------------------------------------------


def written(tmp_path, source: Path, ids: np.ndarray) -> Path:
    with Raster(source, ("rgb", "holes")) as raster:
        place = raster.place
    with label_tiff(tmp_path / "out.tif", ids.shape, TINY_COLOURS, place) as write:
        for strip in (ids[:7], ids[7:8], ids[8:]):
            write(strip)
    return tmp_path / "out.tif"


@pytest.mark.parametrize("crs", [32632, 4326, 2056])
def test_a_label_map_lies_in_the_place_of_its_image(tmp_path, crs):
    """The axes are turned a bit: the whole transformation counts, not only its origin and scale."""
    place = rasterio.Affine(0.5, 0.1, 5e5, 0.1, -0.5, 5.4e6)
    source = write_tif(tmp_path / "in.tif", noise(300, 520), crs=f"EPSG:{crs}", transform=place)
    ids = np.random.default_rng(0).choice([0, 1, 2, 255], (300, 520)).astype(np.uint8)
    with rasterio.open(written(tmp_path, source, ids)) as file:
        assert file.crs.to_epsg() == crs and file.transform.almost_equals(place) and file.nodata == 255
        assert file.profile["tiled"] and file.compression.name == "deflate"
        assert [file.colormap(1)[k][:3] for k in range(3)] == list(map(tuple, TINY_COLOURS.tolist()))
        np.testing.assert_array_equal(file.read(1), ids)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.tif", "out.tif"]


def test_ground_control_points_are_kept(tmp_path):
    points = [GroundControlPoint(row, column, 10 + column, 50 - row) for row, column in ((0, 0), (0, 40), (30, 0))]
    source = write_tif(tmp_path / "in.tif", noise(30, 40), gcps=points, crs="EPSG:4326")
    with rasterio.open(written(tmp_path, source, np.zeros((30, 40), np.uint8))) as file:
        kept, crs = file.gcps
        assert crs.to_epsg() == 4326
        assert [(p.row, p.col, p.x, p.y) for p in kept] == [(p.row, p.col, p.x, p.y) for p in points]


def test_world_files_place_tiffs_and_are_copied_for_others(tmp_path):
    Image.fromarray(noise(30, 40)).save(tmp_path / "in.tif")
    (tmp_path / "in.tfw").write_text("0.5\n0\n0\n-0.5\n500000.25\n5399999.75\n")  # the centre of the first pixel
    with rasterio.open(written(tmp_path, tmp_path / "in.tif", np.zeros((30, 40), np.uint8))) as file:
        assert file.transform == UTM["transform"]
    for name, target in (("in.tfw", "a.pgw"), ("b.jgw", "b.pgw"), ("c.jpgw", "c.pgw"), ("d.wld", "d.pgw")):
        (tmp_path / name).write_text(name)
        image = {"in.tfw": "in.tif", "d.wld": "d.png"}.get(name, f"{name[0]}.jpg")
        copy_world_file(tmp_path / image, tmp_path / "results" / f"{target[0]}.png")
        assert (tmp_path / "results" / target).read_text() == name
    copy_world_file(tmp_path / "none.png", tmp_path / "results" / "none.png")
    assert not (tmp_path / "results" / "none.pgw").exists()


@pytest.mark.parametrize(
    ("crs", "transform", "expected"),
    [
        (32632, from_origin(5e5, 5.4e6, 0.5, 0.25), 0.125),
        (32632, rasterio.Affine(3, 4, 0, 4, -3, 0), 25.0),  # turned; the determinant counts
        (2056, from_origin(2.6e6, 1.2e6, 2, 2), 4.0),
        (2263, from_origin(1e6, 2e5, 10, 10), 100 * 0.3048006096**2),  # New York, in US feet
        (4326, from_origin(8, 50, 1e-5, 1e-5), None),  # degrees
        (3857, from_origin(1e6, 6e6, 1, 1), None),  # web maps: metres at the equator alone
    ],
)
def test_the_area_of_a_pixel(tmp_path, crs, transform, expected):
    with Raster(write_tif(tmp_path / "a.tif", noise(8, 9), crs=f"EPSG:{crs}", transform=transform)) as raster:
        assert raster.square_metres == (None if expected is None else pytest.approx(expected, rel=1e-9))
