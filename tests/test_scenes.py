"""Prediction of whole scenes: layout of windows, blending, what is written, georeference, files that are no scene."""

import json
import shutil
import tracemalloc

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import TINY_COLOURS
from tests.steps import account, experiment, step
from tools.command import UserError
from tools.geotiff import GEOREFERENCE, TILE, write_tiff
from tools.rasters import Raster, covering_starts
from tools.scene_windows import Windows, blending_weight, label_strips

UTM = [  # half a metre a pixel, UTM zone 32 north, as GDAL writes it
    (33550, "d", 3, (0.5, 0.5, 0.0), True),
    (33922, "d", 6, (0.0, 0.0, 0.0, 500000.0, 5400000.0, 0.0), True),
    (34735, "H", 16, (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32632), True),
]


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def save(path, image, **options):
    if path.suffix == ".tif":
        tifffile.imwrite(path, image, photometric="rgb" if image.ndim == 3 else "minisblack", **options)
    else:
        Image.fromarray(image).save(path)
    return path


# windows and blending ----------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.data())
def test_windows_cover_every_pixel(size, data):
    length, stride = data.draw(st.integers(size, 400)), data.draw(st.integers(1, size))
    starts = covering_starts(length, size, stride)
    covered = np.zeros(length, int)
    for start in starts:
        assert 0 <= start <= length - size
        covered[start : start + size] += 1
    assert (covered > 0).all() and starts == sorted(set(starts))
    assert all(start == index * stride for index, start in enumerate(starts[:-1]))
    assert len(starts) == -(-(length - size) // stride) + 1  # not one more than needed


def logits_of(images: torch.Tensor, size: int, classes: int = 4) -> torch.Tensor:
    """A stand-in for a network: what it says of a pixel depends on the colours and on the place in the window."""
    maps = torch.from_numpy(np.random.default_rng(5).normal(0, 1, (classes, 3, size, size)).astype(np.float32))
    return torch.einsum("bchw,kchw->bkhw", images.float() / 255 - 0.5, maps)


def straightforward(image: np.ndarray, size: int, stride: int) -> np.ndarray:
    """Weighted mean logits (K,H,W) float64, kept for the whole scene and made one window at a time."""
    height, width = image.shape[:2]
    padded = np.pad(image, ((0, max(0, size - height)), (0, max(0, size - width)), (0, 0)), mode="reflect")
    ramp = np.sin(np.pi * (np.arange(size) + 0.5) / size) ** 2
    total = np.zeros((4, *padded.shape[:2]))
    weights = np.zeros(padded.shape[:2])
    y = 0
    while True:
        y, x = min(y, len(padded) - size), 0
        while True:
            x = min(x, padded.shape[1] - size)
            window = torch.from_numpy(padded[y : y + size, x : x + size].copy()).permute(2, 0, 1)
            weight = np.outer(ramp, ramp)
            total[:, y : y + size, x : x + size] += weight * logits_of(window[None], size)[0].double().numpy()
            weights[y : y + size, x : x + size] += weight
            if x + size == padded.shape[1]:
                break
            x += stride
        if y + size == len(padded):
            break
        y += stride
    return (total / weights)[:, :height, :width]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(2, 24), st.integers(1, 7), st.data())
def test_stitched_equals_full_accumulation(tmp_path_factory, height, width, size, at_once, data):
    stride = data.draw(st.integers(1, size))
    image = noise(height, width)
    path = save(tmp_path_factory.mktemp("scene") / "a.tif", image, rowsperstrip=5, compression="zlib")
    with Raster(path) as raster:
        windows = Windows(size, stride, at_once)
        found = np.concatenate(list(label_strips(lambda images: logits_of(images, size), raster, 4, windows)))
    expected = straightforward(image, size, stride)
    assert found.shape == (height, width) and found.dtype == np.uint8
    second, first = np.sort(expected, axis=0)[-2:]
    clear = first - second > 1e-4  # nearer ones may fall either way in float32
    np.testing.assert_array_equal(found[clear], expected.argmax(0)[clear])
    assert clear.mean() > 0.9


def test_weights_are_positive_and_smooth():
    weight = blending_weight(512)
    assert weight.min() > 0 and weight.max() <= 1 and torch.equal(weight, weight.T)
    assert weight[0].max() < 1e-4 and weight.diff(dim=0).abs().max() < 0.01


def test_a_constant_model_gives_constant_labels(tmp_path):
    path = save(tmp_path / "a.png", noise(75, 130))
    one_hot = torch.tensor([0.0, 0.0, 1.0])[None, :, None, None]
    with Raster(path) as raster:
        strips = label_strips(lambda images: one_hot.expand(len(images), 3, 32, 32), raster, 3, Windows(32, 20, 4))
        assert (np.concatenate(list(strips)) == 2).all()


def test_nodata_becomes_255_and_costs_nothing(tmp_path):
    image = noise(64, 96) // 2 + 1
    image[:, :40] = 0
    image[50, 50] = 0
    image[51, 51, 0] = 0  # one channel alone is no hole
    path = save(tmp_path / "a.tif", image, extratags=[(42113, "s", 0, "0", True)])
    seen = []

    def predict(images):
        seen.extend(images)
        return torch.zeros(len(images), 3, 32, 32)

    with Raster(path, ("rgb", "holes")) as raster:
        found = np.concatenate(list(label_strips(predict, raster, 3, Windows(32, 32, 4))))
    hole = (image == 0).all(-1)
    assert (found[hole] == 255).all() and (found[~hole] == 0).all() and found[51, 51] == 0
    assert len(seen) == 4  # of six windows: the left ones hold nothing


def test_memory_does_not_grow_with_the_height(tmp_path):
    """Rows are handed on as they are finished: eight times the height needs hardly more memory."""
    peaks = []
    for height in (512, 4096):
        path = save(
            tmp_path / f"{height}.tif", np.zeros((height, 256, 3), np.uint8), compression="zlib", rowsperstrip=64
        )
        with Raster(path) as raster:
            strips = label_strips(lambda images: torch.zeros(len(images), 3, 64, 64), raster, 3, Windows(64, 48, 4))
            tracemalloc.start()
            write_tiff(tmp_path / "out.tif", strips, raster.shape, TINY_COLOURS, [])
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] and peaks[1] < 4096 * 256 * 0.8  # less than the label map alone


# what is written ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (300, 520), (256, 512)])
def test_a_written_tiff_reads_back(tmp_path, shape):
    ids = np.random.default_rng(0).choice([0, 1, 2, 255], shape).astype(np.uint8)
    write_tiff(tmp_path / "a.tif", [ids[:100], ids[100:101], ids[101:]], shape, TINY_COLOURS, UTM)
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        page = tiff.pages[0]
        np.testing.assert_array_equal(page.asarray(), ids)
        assert page.is_tiled and page.tilewidth == TILE and page.compression != 1
        assert page.tags[42113].value == "255" and page.colormap[:, 2].tolist() == [0, 65535, 0]
        assert [tuple(page.tags[code].value) for code, *_ in UTM] == [value for *_, value, _ in UTM]
    with Image.open(tmp_path / "a.tif") as image:
        assert image.mode == "P" and image.getpalette()[:9] == TINY_COLOURS.ravel().tolist()
        np.testing.assert_array_equal(np.array(image), ids)


def scene_of(root, name="scene.tif", shape=(90, 150), **options):
    image = noise(*shape)
    image[:20, :30] = 0
    if name.endswith(".tif"):
        options = {"extratags": [*UTM, (42113, "s", 0, "0", True)], "compression": "zlib", "tile": (64, 64)} | options
    return save(root / name, image, **options)


FAST = {"scales": (1.0,), "images_at_once": 2}


def test_a_geotiff_keeps_its_place(copy):
    path = scene_of(copy)
    step("inference_segmentation", copy, scene=(path,), **FAST)
    folder = experiment(copy) / "scenes"
    with Raster(folder / "scene.tif", ("palette",)) as raster:
        assert raster.shape == (90, 150) and raster.nodata == 255
        assert [(code, value) for code, _, _, value, _ in raster.tags(GEOREFERENCE)] == [
            (code, value) for code, _, _, value, _ in UTM
        ]
        ids = raster.read(0, 0, 90, 150)[..., 0]
    assert (ids[:20, :30] == 255).all() and (ids[:, 30:] < 3).all() and (ids[20:] < 3).all()
    assert account(folder)["finished"] and account(folder)["files"] == 1
    with Image.open(folder / "overview" / "scene.png") as overview:
        assert overview.width > 3 * 150 and overview.height > 90


@pytest.mark.parametrize("crs", [32632, 4326, 2056])
def test_gdal_finds_both_in_the_same_place(tmp_path, crs):
    """Written by the library that GIS programs use, and the label map read by it; the axes are turned a bit."""
    rasterio = pytest.importorskip("rasterio", reason="rasterio, which reads and writes by GDAL, is not installed")
    place = rasterio.Affine(0.5, 0.1, 5e5, 0.1, -0.5, 5.4e6)
    profile = {"driver": "GTiff", "width": 40, "height": 30, "count": 3, "dtype": "uint8", "tiled": True, "nodata": 0}
    with rasterio.open(tmp_path / "in.tif", "w", crs=f"EPSG:{crs}", transform=place, compress="lzw", **profile) as file:
        file.write(noise(30, 40).transpose(2, 0, 1))
    ids = np.random.default_rng(0).choice([0, 1, 2, 255], (30, 40)).astype(np.uint8)
    with Raster(tmp_path / "in.tif", ("rgb", "holes")) as raster:
        assert raster.nodata == 0
        write_tiff(tmp_path / "out.tif", [ids], (30, 40), TINY_COLOURS, raster.tags(GEOREFERENCE))
    with rasterio.open(tmp_path / "out.tif") as file:
        assert file.crs.to_epsg() == crs and file.transform.almost_equals(place) and file.nodata == 255
        assert file.colormap(1)[1] == (0, 0, 255, 255) and file.profile["tiled"] and file.compression.name == "deflate"
        np.testing.assert_array_equal(file.read(1), ids)


def test_a_png_keeps_its_world_file_and_may_be_small(copy):
    path = scene_of(copy, "small.png", (40, 50))
    path.with_suffix(".pgw").write_text("0.5\n0\n0\n-0.5\n500000\n5400000\n")
    step("inference_segmentation", copy, scene=(path,), nodata=0, **FAST)
    folder = experiment(copy) / "scenes"
    assert (folder / "small.pgw").read_text() == path.with_suffix(".pgw").read_text()
    with Image.open(folder / "small.png") as image:
        ids = np.array(image)
        assert image.mode == "P" and image.getpalette()[:9] == TINY_COLOURS.ravel().tolist()
    assert ids.shape == (40, 50) and (ids[:20, :30] == 255).all() and (ids[20:] < 3).all()


def test_a_scene_of_one_window_is_segmented_like_a_patch(copy):
    patch = copy / "datasets" / "tiny" / "test" / "images" / "test_1.png"
    step("inference_segmentation", copy, scene=(patch,), images_at_once=1)
    found, expected = (
        np.array(Image.open(experiment(copy) / folder / "test_1.png")) for folder in ("scenes", "segmentation")
    )
    assert (found == expected).mean() > 0.999  # the batches differ in size, and so may sums in their last bits


def test_scenes_continue_and_never_mix(copy, capsys):
    first, second = scene_of(copy, "a.tif"), scene_of(copy, "b.tif")
    folder = experiment(copy) / "scenes"
    segmented = account(experiment(copy) / "segmentation")
    step("inference_segmentation", copy, scene=(first,), **FAST)
    written = (folder / "a.tif").stat().st_mtime_ns
    capsys.readouterr()
    step("inference_segmentation", copy, scene=(first, second), **FAST)
    assert "a.tif is there already" in capsys.readouterr().out
    assert (folder / "a.tif").stat().st_mtime_ns == written and account(folder)["files"] == 2
    with pytest.raises(UserError, match=r"scenes was made with other settings .overlap: 0.25 there, 0.5 now"):
        step("inference_segmentation", copy, scene=(first,), overlap=0.5, **FAST)
    (copy / "other").mkdir()
    with pytest.raises(UserError, match=r"a\.tif was made from another file than .*other.a\.tif"):
        step("inference_segmentation", copy, scene=(scene_of(copy / "other", "a.tif"),), **FAST)
    step("inference_segmentation", copy, scene=(first,), overlap=0.5, overwrite=True, **FAST)
    assert not (folder / "b.tif").exists() and account(folder)["constants"]["overlap"] == 0.5
    assert account(experiment(copy) / "segmentation") == segmented  # the patches are another step's


def rgba(alpha):
    return np.dstack([noise(70, 80), np.broadcast_to(np.asarray(alpha, np.uint8), (70, 80))])


@pytest.mark.parametrize(
    ("name", "image", "sentence"),
    [
        (
            "a.tif",
            noise(70, 80).astype(np.uint16),
            "a.tif has 3 channels of 16 bits, but three of 8 bits .*gdal_translate",
        ),
        ("a.tif", noise(70, 80)[..., 0], "a.tif has 1 channel of 8 bits"),
        ("a.png", noise(70, 80)[..., 0], "a.png has 1 channel of 8 bits"),
        ("a.tif", rgba(noise(70, 80)[..., 0]), "a.tif has a fourth channel that is no alpha of 0 and 255"),
        ("a.jpg", None, "the scene .*a.jpg is missing"),
        ("a.jp2", b"", "a.jp2 is none of .tif, .*gdal_translate"),
        ("a.tif", b"text", "a.tif cannot be read as an image"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_files_are_refused_by_name(copy, name, image, sentence):
    path = copy / name
    if isinstance(image, bytes):
        path.write_bytes(image)
    elif image is not None:
        save(path, image, **({"extrasamples": ["unassalpha"]} if image.shape[2:] == (4,) else {}))
    with pytest.raises(UserError, match=sentence):
        step("inference_segmentation", copy, scene=(path,), **FAST)
    assert not list((experiment(copy) / "scenes").glob("*.tif"))


def test_alpha_and_grey_where_they_can_be_read(copy):
    alpha = np.full((70, 80), 255)
    for name, image, more in (
        ("opaque", rgba(alpha), {}),
        ("holes", rgba(np.where(np.arange(80) < 9, 0, alpha)), {}),
        ("grey", noise(70, 80)[..., 0], {"grey": "repeat", "experiment": "grey"}),
    ):
        if more:
            shutil.copytree(experiment(copy), experiment(copy, "grey"))
            shutil.rmtree(experiment(copy, "grey") / "scenes")
        path = save(copy / f"{name}.tif", image, **({"extrasamples": ["unassalpha"]} if image.ndim == 3 else {}))
        step("inference_segmentation", copy, scene=(path,), **FAST, **more)
        ids = tifffile.imread(experiment(copy, more.get("experiment", "prc")) / "scenes" / f"{name}.tif")
        assert ((ids == 255).sum() == 70 * 9) if name == "holes" else (ids < 3).all()


def test_other_slips(copy):
    path = scene_of(copy)
    (copy / "more").mkdir()
    for change, sentence in (
        ({"scene": (copy,)}, "is a folder: name its files"),
        ({"scene": (path, scene_of(copy / "more"))}, "two scenes are called scene"),
        ({"overlap": 0.9}, "overlap is 0.9"),
        ({"nodata": 256}, "nodata is 256"),
        ({"experiment": "nothing"}, "segmenter is missing: run step 5"),
    ):
        with pytest.raises(UserError, match=sentence):
            step("inference_segmentation", copy, **({"scene": (path,)} | change))
    run = experiment(copy) / "segmenter" / "run.json"
    content = json.loads(run.read_text())
    content["constants"]["dataset"] = "isaid"
    run.write_text(json.dumps(content))
    with pytest.raises(UserError, match="segmenter was trained on isaid: name that one"):
        step("inference_segmentation", copy, scene=(path,))
    assert not (experiment(copy) / "scenes").exists()
