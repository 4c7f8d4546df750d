"""segment_scene.py: layout of windows, blending, what is written, what is kept or refused, and areas."""

import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import segment_scene
from tests.conftest import TINY_COLOURS
from tests.steps import experiment, record
from tests.tiffs import UTM, noise, write_tif
from tools.command import UserError
from tools.rasters import Raster, label_tiff
from tools.scene_windows import label_strips

CPU = torch.device("cpu")

# windows and blending ----------------------------------------------------------------------------------------------


def logits_of(images: torch.Tensor, size: int, classes: int = 4) -> torch.Tensor:
    """A stand-in for a network: what it says of a pixel depends on the colours and on the place in the window."""
    maps = torch.from_numpy(np.random.default_rng(5).normal(0, 1, (classes, 3, size, size)).astype(np.float32))
    return torch.einsum("bchw,kchw->bkhw", images.float() / 255 - 0.5, maps)


def starts(length: int, size: int, stride: int) -> list[int]:
    """Every stride, and the last window moved inward to the border."""
    return sorted({min(start, length - size) for start in range(0, length, stride)})


def straightforward(image: np.ndarray, size: int, stride: int) -> np.ndarray:
    """Weighted mean logits (K,H,W) float64, kept for the whole scene and made one window at a time."""
    height, width = image.shape[:2]
    padded = np.pad(image, ((0, max(0, size - height)), (0, max(0, size - width)), (0, 0)), mode="reflect")
    ramp = np.sin(np.pi * (np.arange(size) + 0.5) / size) ** 2
    total, weights = np.zeros((4, *padded.shape[:2])), np.zeros(padded.shape[:2])
    for y in starts(len(padded), size, stride):
        for x in starts(padded.shape[1], size, stride):
            window = torch.from_numpy(padded[y : y + size, x : x + size].copy()).permute(2, 0, 1)
            logits = logits_of(window[None], size)[0].double().numpy()
            total[:, y : y + size, x : x + size] += np.outer(ramp, ramp) * logits
            weights[y : y + size, x : x + size] += np.outer(ramp, ramp)
    return (total / weights)[:, :height, :width]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(2, 24), st.integers(1, 7), st.data())
def test_stitched_equals_full_accumulation(tmp_path_factory, height, width, size, at_once, data):
    stride = data.draw(st.integers(1, size))
    image = noise(height, width)
    path = write_tif(tmp_path_factory.mktemp("scene") / "a.tif", image, blockysize=5)
    with Raster(path) as raster:
        windows = {"size": size, "stride": stride, "at_once": at_once, "device": CPU}
        labels = np.concatenate(list(label_strips(lambda images: logits_of(images, size), raster, 4, **windows)))
    expected = straightforward(image, size, stride)
    assert labels.shape == (height, width) and labels.dtype == np.uint8
    second, first = np.sort(expected, axis=0)[-2:]
    clear = first - second > 1e-4  # nearer ones may fall either way in float32
    np.testing.assert_array_equal(labels[clear], expected.argmax(0)[clear])
    assert clear.mean() > 0.9


def test_nodata_becomes_255_and_costs_nothing(tmp_path):
    image = noise(64, 96) // 2 + 1
    image[:, :40] = 0
    image[50, 50] = 0
    image[51, 51, 0] = 0  # one channel alone is no nodata
    path = write_tif(tmp_path / "a.tif", image, nodata=0)
    seen = []

    def predict(images):
        seen.extend(images)
        return torch.zeros(len(images), 3, 32, 32)

    with Raster(path, ("rgb", "holes")) as raster:
        strips = label_strips(predict, raster, 3, size=32, stride=32, at_once=4, device=CPU)
        labels = np.concatenate(list(strips))
    hole = (image == 0).all(-1)
    assert (labels[hole] == 255).all() and (labels[~hole] == 0).all() and labels[51, 51] == 0
    assert len(seen) == 4  # of six windows: the left ones hold nothing


def test_memory_does_not_grow_with_the_height(tmp_path):
    """Rows are written as they are finished: eight times the height needs hardly more memory."""
    peaks = []
    for height in (512, 4096):
        path = write_tif(tmp_path / f"{height}.tif", np.zeros((height, 256, 3), np.uint8), blockysize=64)
        with Raster(path) as raster:
            windows = {"size": 64, "stride": 48, "at_once": 4, "device": CPU}
            strips = label_strips(lambda images: torch.zeros(len(images), 3, 64, 64), raster, 3, **windows)
            tracemalloc.start()
            with label_tiff(tmp_path / "out.tif", raster.shape, TINY_COLOURS, {}) as write:
                for strip in strips:
                    write(strip)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] and peaks[1] < 4096 * 256 * 0.8  # less than the label map alone


# what is written ---------------------------------------------------------------------------------------------------


def refused(words):
    return pytest.raises(UserError, match=words)


@pytest.fixture
def root(finished, tmp_path):
    """The data set, its segmenter and its segmentation, which a test may spoil."""
    root = tmp_path / "root"
    shutil.copytree(finished / "datasets", root / "datasets")
    (experiment(root) / "segmenter").mkdir(parents=True)
    (experiment(root) / "segmenter" / "model.pt").symlink_to(experiment(finished) / "segmenter" / "model.pt")
    shutil.copy(experiment(finished) / "segmenter" / "run.json", experiment(root) / "segmenter")
    shutil.copytree(experiment(finished) / "segmentation", experiment(root) / "segmentation")
    return root


def segment(root: Path, *scenes: Path, **constants) -> Path:
    """Run the script in this process; returns the folder of the results."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the programs run here, so that equal sums are added in equal order
    fast = {"dataset": "tiny", "root": root, "scales": (1.0,), "images_at_once": 2, "precision": "fp32"}
    try:
        segment_scene.main(segment_scene.Constants(scene=scenes, **(fast | constants)))
    finally:
        torch.set_num_threads(threads)
    return experiment(root, constants.get("experiment", "prc")) / "scenes"


def scene_of(folder: Path, name: str = "scene.tif", shape: tuple[int, int] = (90, 150), **profile) -> Path:
    """Noise with a corner of zeros."""
    folder.mkdir(exist_ok=True)
    image = noise(*shape)
    image[:20, :30] = 0
    if name.endswith(".tif"):
        tiles = {"tiled": True, "blockxsize": 64, "blockysize": 64}
        return write_tif(folder / name, image, nodata=0, **(UTM | tiles | profile))
    Image.fromarray(image).save(folder / name)
    return folder / name


def ids_of(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        assert image.mode == "P"
        return np.array(image)


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_a_geotiff_keeps_its_place(root, capsys):
    folder = segment(root, scene_of(root))
    with rasterio.open(folder / "scene.tif") as file:
        assert (file.crs, file.transform, file.nodata) == (UTM["crs"], UTM["transform"], 255)
        ids = file.read(1)
    assert ids.shape == (90, 150) and (ids[:20, :30] == 255).all() and (ids[:, 30:] < 3).all() and (ids[20:] < 3).all()
    made = json.loads((folder / "made_from" / "scene.json").read_text())
    assert list(made["pixels"].values()) == [(ids == k).sum() for k in range(3)] and made["square_metres"] == 0.25
    assert made["constants"]["overlap"] == 0.25 and made["constants"]["precision"] == "fp32"
    with Image.open(folder / "overview" / "scene.png") as overview:
        assert overview.width > 3 * 150 and overview.height > 90
    printed = capsys.readouterr().out
    for k, name in enumerate(("ground", "roof", "tree")):
        pixels = int((ids == k).sum())
        assert f"{name} {pixels / (90 * 150 - 20 * 30):.1%}, {pixels / 4:,.0f} m2" in printed
    assert str(folder / "scene.tif") in printed and str(folder / "overview" / "scene.png") in printed


def test_a_png_keeps_its_world_file_and_may_be_small(root, capsys):
    path = scene_of(root, "small.png", (40, 50))
    path.with_suffix(".pgw").write_text("0.5\n0\n0\n-0.5\n500000\n5400000\n")
    folder = segment(root, path, nodata=0)
    assert (folder / "small.pgw").read_text() == path.with_suffix(".pgw").read_text()
    ids = ids_of(folder / "small.png")
    assert ids.shape == (40, 50) and (ids[:20, :30] == 255).all() and (ids[20:] < 3).all()
    with Image.open(folder / "small.png") as image:
        assert image.getpalette()[:9] == TINY_COLOURS.ravel().tolist()
    printed = capsys.readouterr().out
    assert "ground " in printed and " m2" not in printed  # a world file does not say in what unit it counts
    path.with_suffix(".pgw").unlink()
    segment(root, path, nodata=0, overwrite=True)
    assert not (folder / "small.pgw").exists()


def test_a_jpg_gives_a_png_and_a_jp2_a_tif(root):
    for name in ("a.jpg", "b.jp2"):
        Image.fromarray(noise(70, 80)).save(root / name)
    folder = segment(root, root / "a.jpg", root / "b.jp2")
    assert ids_of(folder / "a.png").shape == ids_of(folder / "b.tif").shape == (70, 80)


def test_a_scene_of_one_window_is_segmented_like_a_patch(root):
    patch = root / "datasets" / "tiny" / "test" / "images" / "test_1.png"
    folder = segment(root, patch, images_at_once=1, scales=(0.5, 1.0, 1.5, 2.0))
    labels, expected = ids_of(folder / "test_1.png"), ids_of(experiment(root) / "segmentation" / "test_1.png")
    assert (labels == expected).mean() > 0.999  # the batches differ in size, and so may sums in their last bits


def test_a_scene_of_nodata_has_no_areas():
    assert segment_scene.areas({"road": 0}, None) == ["road 0.0%"]


# what is kept, replaced or refused ---------------------------------------------------------------------------------


def test_results_of_other_scenes_are_never_touched(root, capsys):
    first, second, third = (scene_of(root, f"{name}.tif") for name in "abc")
    folder = segment(root, first)
    before = state(folder)
    capsys.readouterr()
    segment(root, first, second)
    assert f"exists already: {folder / 'a.tif'}" in capsys.readouterr().out
    assert before.items() <= state(folder).items() and (folder / "b.tif").exists()
    before = state(folder)
    with refused(r"(?s)1 of 2 scenes.*a\.tif .*overlap: 0.25 there, 0.5 now"):
        segment(root, first, third, overlap=0.5)  # the first is refused alone
    assert before.items() <= state(folder).items() and (folder / "c.tif").exists()
    before = state(folder)
    segment(root, first, overlap=0.5, overwrite=True)
    after = state(folder)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"a.tif", "made_from/a.json", "overview/a.png"} and before.keys() == after.keys()
    assert record(experiment(root) / "segmentation")["finished"]  # the patches are another step's


def test_a_result_of_another_file_or_training_is_refused(root):
    path = scene_of(root, "a.tif")
    segment(root, path)
    with refused(r"made from .*root.a\.tif"):
        segment(root, scene_of(root / "other", "a.tif"))
    with refused(r"scales: \[1.0\] there, \[1.5\] now"):
        segment(root, path, scales=(1.5,))
    scene_of(root, "a.tif", (91, 150))
    with refused(r"a\.tif before"):
        segment(root, path)
    segment(root, path, overwrite=True)
    run = experiment(root) / "segmenter" / "run.json"
    run.write_text(json.dumps(json.loads(run.read_text()) | {"started": "another day"}))
    with refused("another run"):
        segment(root, path)


def test_an_interrupted_scene_is_segmented_again(root, monkeypatch):
    path = scene_of(root, "a.tif")
    folder = segment(root, path)
    good = ids_of(folder / "a.tif")
    monkeypatch.setattr(segment_scene, "contact_sheet", lambda *arguments: 1 / 0)  # after the label map is written
    with pytest.raises(ZeroDivisionError):
        segment(root, path, overlap=0.5, overwrite=True)
    monkeypatch.undo()
    (folder / ".a.99.tmp.tif").write_bytes(b"half")
    (folder / ".b.99.tmp.tif").write_bytes(b"another run's")
    segment(root, path)  # the new label map must not pass for one of these constants
    np.testing.assert_array_equal(ids_of(folder / "a.tif"), good)
    assert not (folder / ".a.99.tmp.tif").exists() and (folder / ".b.99.tmp.tif").exists()


def test_a_damaged_record_is_refused_alone(root):
    first, second = scene_of(root, "a.tif"), scene_of(root, "b.tif")
    folder = segment(root, first)
    for content in (b"", b"{}", b"[[[[", b"\xff", b'{"image": 3, "bytes": "many"}'):
        (folder / "made_from" / "a.json").write_bytes(content)
        with refused(r"a\.json .*--overwrite"):
            segment(root, first, second)
        assert (folder / "b.tif").exists()
    segment(root, first, overwrite=True)


def test_a_scene_that_is_replaced_by_another_format_leaves_one_result(root):
    image = scene_of(root, "a.png")
    image.with_suffix(".pgw").write_text("0.5\n0\n0\n-0.5\n500000\n5400000\n")
    folder = segment(root, image)
    assert (folder / "a.pgw").exists()
    with refused(r"made from .*a\.png"):
        segment(root, scene_of(root, "a.tif"))
    assert (folder / "a.png").exists()
    segment(root, root / "a.tif", overwrite=True)
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == ["a.tif"]


def test_the_segmenter_of_another_experiment(root):
    path = scene_of(root, "a.tif")
    own = segment(root, path)
    folder = segment(root, path, experiment="other", segmenter="prc")
    np.testing.assert_array_equal(ids_of(folder / "a.tif"), ids_of(own / "a.tif"))
    assert not (folder.parent / "segmenter").exists()
    segment(root, path, segmenter="prc")  # the same segmenter, named
    with refused("run step 5, .* --experiment none"):
        segment(root, path, segmenter="none")


# files that are no scene -------------------------------------------------------------------------------------------


def test_alpha_and_grey_where_they_can_be_read(root):
    alpha = np.full((70, 80), 255, np.uint8)
    alpha[:, :9] = 0
    image = np.dstack([noise(70, 80), alpha])
    folder = segment(root, write_tif(root / "holes.tif", image, photometric="rgb", alpha="yes"))
    np.testing.assert_array_equal(ids_of(folder / "holes.tif") == 255, alpha == 0)
    path = write_tif(root / "grey.tif", noise(70, 80)[..., 0])
    with refused(r"grey\.tif .*--grey repeat"):
        segment(root, path)
    assert (ids_of(segment(root, path, grey="repeat") / "grey.tif") < 3).all()


def test_other_slips(root):
    path = scene_of(root)
    (root / "a.img").touch()
    (root / f"{'a' * 201}.tif").touch()
    for change, words in (
        ({"scene": (root,)}, "is a folder"),
        ({"scene": (path, scene_of(root / "more"))}, "two scenes are called scene"),
        ({"scene": ()}, "scene is"),
        ({"scene": (root / "a.jpg",)}, r"a\.jpg is missing"),
        ({"scene": (root / "a.img",)}, r"a\.img .*gdal_translate"),
        ({"scene": (root / f"{'a' * 201}.tif",)}, "200 bytes"),
        ({"overlap": 0.9}, "overlap is 0.9"),
        ({"nodata": 256}, "nodata is 256"),
        ({"experiment": "nothing"}, "run step 5"),
        ({"segmenter": "../prc"}, r"\.\./prc"),
    ):
        constants = {"scene": (path,)} | change
        with refused(words):
            segment(root, *constants.pop("scene"), **constants)
    run = experiment(root) / "segmenter" / "run.json"
    content = json.loads(run.read_text())
    content["constants"]["dataset"] = "isaid"
    run.write_text(json.dumps(content))
    with refused("--dataset isaid"):
        segment(root, path)
    assert not list((experiment(root) / "scenes").glob("*.tif"))


def test_as_a_program(root, run_script):
    """Nothing but our own lines on the terminal, for a scene without a georeference and a broken one."""
    good, broken = write_tif(root / "good.tif", noise(70, 80)), root / "broken.tif"
    broken.write_bytes(good.read_bytes()[:-900])
    command = ("segment_scene.py", "--dataset", "tiny", "--root", root, "--scales", 1, "--scene")
    result = run_script(*command, good, broken, fails=True)
    assert result.stderr.startswith("error: 1 of 2 scenes") and result.stderr.count("\n") == 2
    assert "broken.tif cannot be read as an image" in result.stderr
    assert (experiment(root) / "scenes" / "good.tif").exists()
