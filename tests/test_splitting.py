"""The splitters: exact class counts, the rules of method "Data", the same bytes with any workers, and bad input."""

import hashlib
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from datasetsprocess import isaid_split, potsdam_patch_split, vaihingen_patch_split
from datasetsprocess.cutting import Scene, four_versions, whole_tiles
from datasetsprocess.scene_files import find_sources
from datasetsprocess.scene_labels import read_truth
from tests.tiffs import write_tif
from tools.command import UserError
from tools.dataset import load_dataset
from tools.labels import IGNORE, save_image
from tools.rasters import KINDS, Raster
from tools.steps import SPLITS

SCRIPTS = {"vaihingen": "vaihingen_patch_split.py", "potsdam": "potsdam_patch_split.py", "isaid": "isaid_split.py"}
TOP, TRUTH = "top/top_mosaic_09cm_area{}.tif", "gts_for_participants/top_mosaic_09cm_area{}.tif"


def script(name: str) -> Path:
    return ROOT / "datasetsprocess" / SCRIPTS[name]


def cut(root: Path, name: str = "vaihingen", dataset: str = "small", **constants) -> None:
    """Run a splitter in this process."""
    module = {"vaihingen": vaihingen_patch_split, "potsdam": potsdam_patch_split, "isaid": isaid_split}[name]
    module.main(module.Constants(dataset=dataset, root=root, **({"workers": 0} | constants)))


def refused(words: str):
    return pytest.raises(UserError, match=words)


def decode_by_loop(path: Path, dataset) -> np.ndarray:
    """The class ids of a truth, independent of the look-up table: one comparison for each class."""
    rgb = read(path)
    ids = np.full(rgb.shape[:2], IGNORE, np.uint8)
    for k, colour in enumerate(dataset.colours):
        ids[(rgb == colour).all(-1)] = k
    return ids


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def patches_of(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """id -> image, class ids; the two folders hold the same ids."""
    images, labels = ({path.stem: path for path in (folder / kind).glob("*.png")} for kind in ("images", "labels"))
    assert images.keys() == labels.keys()
    return {id: (read(images[id]), read(labels[id])) for id in sorted(images)}


def digests(folder: Path) -> dict[str, str]:
    files = folder.rglob("*.png")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def describe(root: Path, name: str, text: str) -> None:
    file = root / "datasets" / name / "dataset.toml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def small_vaihingen(root: Path, areas=("1", "2"), height: int = 40, width: int = 70) -> Path:
    """A data set "small" in Vaihingen's layout: tiles of 16, area 1 trains and area 2 tests. Returns its raw folder."""
    describe(root, "small", 'base = "vaihingen"\npatch_size = 16\n[scenes]\ntrain = ["1"]\ntest = ["2"]\n')
    raw, colours = root / "datasets" / "small" / "raw", load_dataset("vaihingen").colours
    for area in areas:
        random = np.random.default_rng(int(area))
        ids = np.kron(random.integers(0, 6, (height // 8 + 1, width // 8 + 1)), np.ones((8, 8), int))[:height, :width]
        for place, pixels in ((TOP, random.integers(0, 256, (height, width, 3))), (TRUTH, colours[ids])):
            file = raw / place.format(area)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_tif(file, pixels.astype(np.uint8), compress="lzw", blockysize=1)
    return raw


def open_scene(dataset, ids: np.ndarray, split: str, tmp_path: Path, seed: int = 0) -> tuple[Scene, np.ndarray]:
    image = np.random.default_rng(1).integers(0, 256, (*ids.shape, 3)).astype(np.uint8)
    save_image(tmp_path / "scene.png", image)
    return Scene("s", split, dataset, seed, Raster(tmp_path / "scene.png"), ids.astype(np.uint8)), image


@pytest.fixture
def small(tmp_path):
    """small(base, more) describes a data set with other patches than its base, and loads it."""

    def load(base: str, patch_size: int = 16, more: str = ""):
        describe(tmp_path, "small", f'base = "{base}"\npatch_size = {patch_size}\n{more}')
        return load_dataset("small", tmp_path)

    return load


# tiles and rules ---------------------------------------------------------------------------------------------------


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.integers(1, 40))
def test_whole_tiles_are_exactly_those_that_lie_inside(height, width, patch, stride):
    expected = {
        (r, c) for r in range(90) for c in range(90) if r * stride + patch <= height and c * stride + patch <= width
    }
    tiles = whole_tiles(height, width, patch, stride)
    assert len(tiles) == len(set(tiles)) and set(tiles) == expected and tiles == sorted(tiles)


def test_tiles_that_overlap(tmp_path, small):
    scene, image = open_scene(small("vaihingen", 32, "stride = 16"), np.zeros((48, 63)), "test", tmp_path)
    patches = {place: pixels for place, pixels, _ in vaihingen_patch_split.patches(scene)}
    assert list(patches) == ["r000_c000", "r000_c001", "r001_c000", "r001_c001"]
    np.testing.assert_array_equal(patches["r001_c001"], image[16:48, 16:48])


def test_four_versions_and_all_turns_occur():
    ids = np.arange(16, dtype=np.uint8).reshape(4, 4)
    image = np.repeat(ids[..., None], 3, axis=-1)
    turned = set()
    for seed in range(30):
        versions = four_versions(image, ids, np.random.default_rng(seed))
        assert all((pixels[..., 0] == labels).all() for pixels, labels in versions)
        np.testing.assert_array_equal(versions[0][1], ids)
        np.testing.assert_array_equal(versions[1][1], ids[::-1])
        np.testing.assert_array_equal(versions[2][1], ids[:, ::-1])
        turned.add(int(versions[3][1][0, 0]))
    assert turned == {3, 15, 12}  # the corner that comes to the upper left: 90, 180, 270 degrees


def test_vaihingen_zooms_in_where_the_rare_class_is(tmp_path, small):
    ids = np.zeros((32, 48), int)
    ids[:16, 16:32] = 4  # a tile of cars and trees, every crop of which is above the share
    ids[np.random.default_rng(2).random(ids.shape) < 0.4] = 3
    ids[16:] = ids[:16, :16] = ids[:16, 32:] = 0
    scene, image = open_scene(small("vaihingen"), ids, "train", tmp_path)
    patches = {place: (pixels.copy(), labels.copy()) for place, pixels, labels in vaihingen_patch_split.patches(scene)}
    plain = {"r000_c000", "r000_c002", "r001_c000", "r001_c001", "r001_c002"}  # no car: the tile as it is
    assert patches.keys() == plain | {f"r000_c001_v{version}" for version in range(4)}
    for place in plain:
        y, x = 16 * int(place[1:4]), 16 * int(place[6:])
        np.testing.assert_array_equal(patches[place][0], image[y : y + 16, x : x + 16])
        np.testing.assert_array_equal(patches[place][1], ids[y : y + 16, x : x + 16])
    assert scene.notes["tiles zoomed in and saved in four versions"] == 1
    scene.split = "test"
    assert [place for place, *_ in vaihingen_patch_split.patches(scene)] == [f"r00{r}_c00{c}" for r, c in scene.tiles()]


def test_vaihingen_s_zoom():
    """A square of 6 to 8 pixels of the tile: the image enlarged linearly, the labels by the nearest pixel."""
    rng = np.random.default_rng(0)
    image, ids = rng.integers(0, 256, (16, 16, 3)).astype(np.uint8), rng.choice([0, 4], (16, 16)).astype(np.uint8)
    crops = []
    for side in (6, 7, 8):
        nearest = ((np.arange(16) + 0.5) * side / 16).astype(int)
        for y, x in np.ndindex(17 - side, 17 - side):
            pixels = cv2.resize(image[y : y + side, x : x + side], (16, 16), interpolation=cv2.INTER_LINEAR)
            crops.append((pixels, ids[np.ix_(y + nearest, x + nearest)]))
    for seed in range(20):
        zoomed = vaihingen_patch_split.zoom(image, ids, 6, 8, np.random.default_rng(seed))
        assert any(np.array_equal(zoomed[0], crop[0]) and np.array_equal(zoomed[1], crop[1]) for crop in crops), seed


def test_vaihingen_share_must_be_exceeded(tmp_path, small):
    rules = '[rules]\nrare_class = "Car"\nrare_share = 0.25\ncrop_side = [1, 1]\n'  # the crop is the tile itself
    ids = np.zeros((16, 32), int)
    ids[:4, :16] = ids[:4, 16:] = 4  # exactly a quarter
    ids[4, 16] = 4  # and one pixel more
    scene, _ = open_scene(small("vaihingen", 16, rules), ids, "train", tmp_path)
    places = [place for place, *_ in vaihingen_patch_split.patches(scene)]
    assert places == ["r000_c000", *(f"r000_c001_v{version}" for version in range(4))]


def test_potsdam_drops_tiles_with_too_little_of_a_class(tmp_path, small):
    """The shares are of all 400 pixels of a tile, however many of them are ignored."""
    ids = np.zeros((40, 80), int)
    ids[:2, 20:40] = 1  # exactly 10 %: kept
    ids[:2, 40:60], ids[1, 59] = 1, 0  # one pixel less: dropped
    ids[20:30, 0] = 4  # 10 pixels of car, exactly 2.5 %: kept
    ids[20:29, 20] = 4  # 9 pixels: dropped
    ids[:, 60:] = ids[20:, 40:60] = IGNORE
    ids[20:22, 40:60] = ids[:2, 60:] = ids[20:22, 60:] = 3  # 10 %, without any other class: kept
    ids[1, 79] = IGNORE  # one pixel less: dropped
    scene, image = open_scene(small("potsdam", 20), ids, "train", tmp_path)
    patches = {place: (pixels, labels) for place, pixels, labels in potsdam_patch_split.patches(scene)}
    kept = ["r000_c000", "r000_c001", "r001_c000", "r001_c002", "r001_c003"]
    assert list(patches) == [f"{place}_v{version}" for place in kept for version in range(4)]
    np.testing.assert_array_equal(patches["r000_c001_v0"][0], image[:20, 20:40])
    np.testing.assert_array_equal(patches["r000_c001_v1"][1], ids[:20, 20:40][::-1])
    assert scene.notes["tiles dropped, a class below its minimum share"] == 3
    scene.split = "test"
    assert len(list(potsdam_patch_split.patches(scene))) == 8


def test_isaid_counts_patches_and_skips_scenes(tmp_path, small):
    dataset = small("isaid")
    scene, image = open_scene(dataset, np.full((40, 50), 9), "train", tmp_path)
    windows = np.lib.stride_tricks.sliding_window_view(image, (16, 16, 3))[:, :, 0]
    counts = set()
    for seed in range(12):
        scene.seed = seed
        patches = list(isaid_split.patches(scene))
        counts.add(len(patches))
        assert {place for place, *_ in patches} == {f"p{n}" for n in range(len(patches))}
        assert all((windows == pixels).all((-1, -2, -3)).any() for _, pixels, _ in patches)
    assert counts == {6, 7, 8}
    empty, _ = open_scene(dataset, np.zeros((40, 50)), "train", tmp_path)
    assert not list(isaid_split.patches(empty)) and sum(empty.notes.values()) == 1
    for size in ((15, 99), (16, 99), (99, 16)):  # also where a side is exactly as long as the patch, as in the release
        narrow, _ = open_scene(dataset, np.full(size, 9), "train", tmp_path)
        assert not list(isaid_split.patches(narrow)) and narrow.notes["scenes not larger than a patch, skipped"] == 1
    larger, image = open_scene(dataset, np.full((17, 17), 9), "test", tmp_path)  # the last row and column are not taken
    assert all((pixels == image[:16, :16]).all() for _, pixels, _ in isaid_split.patches(larger))


@pytest.mark.parametrize(("split", "most"), [("train", 192), ("test", 64)])
def test_isaid_s_largest_share_of_background_is_too_much(tmp_path, small, split, most):
    """A scene with one place for a patch of 256 pixels; the shares are numbers that floating point holds exactly."""
    rules = 'background = "background"\npatches_per_scene = [1]\ntries = 3\n'
    dataset = small("isaid", 16, f"[rules]\n{rules}max_background = {{train = 0.75, test = 0.25}}\n")
    for background, count in ((most - 1, 1), (most, 0), (most + 1, 0)):
        ids = np.full((17, 17), 9)
        ids[:16, :16] = np.where(np.arange(256) < background, 0, 9).reshape(16, 16)
        scene, _ = open_scene(dataset, ids, split, tmp_path)
        assert len(list(isaid_split.patches(scene))) == count, background


def test_isaid_stops_after_the_tries(tmp_path, small):
    """Few windows are good: the patches are what the first 100 places of the same random numbers hold."""
    dataset = small("isaid")
    ids = np.zeros((24, 24))
    ids[0, :8] = 9
    used_up = 0
    for seed in range(150):
        scene, _ = open_scene(dataset, ids, "train", tmp_path, seed)
        random, good = scene.random(), 0
        wanted = random.choice([6, 7, 8])
        for _ in range(100):
            y, x = random.integers(0, 8), random.integers(0, 8)  # the last row and column are never taken
            good += int((ids[y : y + 16, x : x + 16] == 0).mean() < 0.98)
        assert len(list(isaid_split.patches(scene))) == min(good, wanted)
        used_up += good < wanted
    assert used_up


# the real files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "image", "truth"),
    [
        ("vaihingen", TOP.format(1), TRUTH.format(1)),
        ("vaihingen", TOP.format(1), "gts_eroded/top_mosaic_09cm_area1_noBoundary.tif"),
        ("potsdam", "2_Ortho_RGB/top_potsdam_2_10_RGB.tif", "5_Labels_all/top_potsdam_2_10_label.tif"),
        (
            "potsdam",
            "2_Ortho_RGB/top_potsdam_2_10_RGB.tif",
            "5_Labels_all_noBoundary/top_potsdam_2_10_label_noBoundary.tif",
        ),
    ],
)
def test_real_isprs_tiles(shared_data, tmp_path, name, image, truth):
    """As a test scene: the patches are all whole tiles, pixel for pixel, with the labels of another decode."""
    dataset, raw = load_dataset(name), shared_data / "isprs" / name.capitalize()
    scene, size = dataset.scenes["train"][0], dataset.patch_size
    describe(tmp_path, "real", f'base = "{name}"\n[scenes]\ntrain = []\ntest = ["{scene}"]\n')
    cut(tmp_path, name, "real", raw=str(raw), truth="eroded" if "noBoundary" in truth else "full")
    patches = patches_of(tmp_path / "datasets" / "real" / "test")
    image, ids = read(raw / image), decode_by_loop(raw / truth, dataset)
    assert len(patches) == (512 // size) ** 2
    assert any((labels == IGNORE).any() for _, labels in patches.values()) == ("noBoundary" in truth)
    for id, (pixels, labels) in patches.items():
        row, column = (int(part[1:]) * size for part in id.removeprefix(f"{scene}_").split("_"))
        np.testing.assert_array_equal(pixels, image[row : row + size, column : column + size])
        np.testing.assert_array_equal(labels, ids[row : row + size, column : column + size])
    assert (tmp_path / "datasets" / "real" / "test" / "contact_sheet.png").exists()


def test_real_isaid_patches_are_windows_of_their_scenes(shared_data, tmp_path):
    """Whole scenes: each patch and its label are the same window of image and independently decoded truth."""
    cut(tmp_path, "isaid", "isaid", raw=str(shared_data / "isaid_originals"))
    dataset = load_dataset("isaid")
    for split, raw, largest in (("train", "train", 0.98), ("test", "val", 0.90)):
        folder, patches = shared_data / "isaid_originals" / raw, patches_of(tmp_path / "datasets" / "isaid" / split)
        scenes = {path.stem for path in (folder / "images").glob("*.png")}
        assert {id.split("_")[0] for id in patches} == scenes
        for scene in scenes:
            image = read(folder / "images" / f"{scene}.png")
            ids = decode_by_loop(folder / "Semantic_masks/images" / f"{scene}_instance_color_RGB.png", dataset)
            runs = np.lib.stride_tricks.sliding_window_view(image[..., 0], 16, axis=1)
            for pixels, labels in (patches[id] for id in patches if id.startswith(scene)):
                starts = np.argwhere((runs == pixels[0, :16, 0]).all(-1))
                windows = [(slice(y, y + 512), slice(x, x + 512)) for y, x in starts]
                (window,) = [window for window in windows if np.array_equal(image[window], pixels)]
                np.testing.assert_array_equal(labels, ids[window])
                assert (labels == 0).mean() < largest


# runs --------------------------------------------------------------------------------------------------------------


def test_same_bytes_with_any_workers_and_others_with_another_seed(tmp_path, run_script):
    scenes = '[scenes]\ntrain = ["1", "3", "4"]\ntest = ["2"]\n'
    results = {}
    for name, constants in (("none", {}), ("two", {"workers": 2}), ("other", {"seed": 1}), ("program", None)):
        root = tmp_path / name
        small_vaihingen(root, areas=("1", "2", "3", "4"))
        describe(root, "small", f'base = "vaihingen"\npatch_size = 16\n{scenes}')
        if constants is None:  # inside its folder
            command = (SCRIPTS["vaihingen"], "--dataset", "small", "--root", root, "--workers", 1)
            run_script(*command, cwd=ROOT / "datasetsprocess")
        else:
            cut(root, **constants)
        results[name] = digests(root / "datasets" / "small")
    assert results["none"] == results["program"] == results["two"] and any("_v0" in name for name in results["none"])
    assert results["none"] != results["other"]
    assert all(results["other"][name] == digest for name, digest in results["none"].items() if name.startswith("test/"))


def test_continues_refuses_other_settings_and_overwrites(tmp_path):
    raw = small_vaihingen(tmp_path)
    folder = tmp_path / "datasets" / "small"
    cut(tmp_path)
    before, record = digests(folder), json.loads((folder / "train" / "run.json").read_text())
    images = sorted((folder / "train" / "images").glob("*.png"))
    assert record["finished"] and record["files"] == len(images)
    # as after a kill: a scene begun but without a record, with a patch that the finished scene will not have
    (folder / "train" / "scenes" / "1.json").unlink()
    images[0].unlink()
    (folder / "train" / "images" / "1_r090_c000.png").write_bytes(images[1].read_bytes())
    (folder / "train" / "labels" / ".1_r000_c000.123.tmp.png").write_bytes(b"half")
    cut(tmp_path)
    assert digests(folder) == before
    with refused("seed: 0 there, 1 now.*--overwrite"):
        cut(tmp_path, seed=1)
    describe(tmp_path, "small", 'base = "vaihingen"\npatch_size = 32\n[scenes]\ntrain = ["1"]\ntest = ["2"]\n')
    with refused("patch_size: 16 there, 32 now"):
        cut(tmp_path)
    assert digests(folder) == before
    cut(tmp_path, overwrite=True)
    assert {len(labels) for _, labels in patches_of(folder / "train").values()} == {32}
    os.utime(raw / TOP.format(2))  # as if exported again under the same name
    with refused(r"area2\.tif .*replaced.*--overwrite"):
        cut(tmp_path)
    assert (raw / TOP.format(1)).exists() and (folder / "dataset.toml").exists()


def test_unknown_colours_stop_or_become_ignore(tmp_path, capsys):
    truth = small_vaihingen(tmp_path) / TRUTH.format(2)
    rgb = read(truth)
    rgb[0, :3] = [(1, 2, 3), (9, 9, 9), (1, 2, 3)]
    write_tif(truth, rgb)
    with refused(r"area2\.tif.*\(1, 2, 3\) in 2 pixels, \(9, 9, 9\) in 1 .*--unknown-colours ignore"):
        cut(tmp_path)
    folder = tmp_path / "datasets" / "small"
    assert len(patches_of(folder / "train")) > 0 and not patches_of(folder / "test")  # the good scene is done
    cut(tmp_path, unknown_colours="ignore", overwrite=True)
    assert "set to 255: 3" in capsys.readouterr().out
    labels = patches_of(folder / "test")["2_r000_c000"][1]
    assert (labels == IGNORE).sum() == 3 and (labels[0, :3] == IGNORE).all()


def test_tiles_without_any_labelled_pixel_are_left_out(tmp_path, capsys):
    truth = small_vaihingen(tmp_path) / TRUTH.format(2)
    rgb = read(truth)
    rgb[:16, :16] = 0  # the eroded boundary's black
    write_tif(truth, rgb)
    cut(tmp_path)
    assert "left out: 1" in capsys.readouterr().out
    tiles = {f"2_r00{r}_c00{c}" for r in range(2) for c in range(4)}
    assert set(patches_of(tmp_path / "datasets" / "small" / "test")) == tiles - {"2_r000_c000"}


def scene_called(name: str, patch_size: int = 16) -> str:
    return f'base = "vaihingen"\npatch_size = {patch_size}\n[scenes]\ntrain = ["{name}"]\ntest = ["2"]\n'


RGB = np.zeros((40, 70, 3), np.uint8)
RULES = 'base = "vaihingen"\n[rules]\nrare_class = "Bus"\n'
FAULTS = {  # words of the message -> what happens to a scene and its truth
    "area1.tif has 69 x 40 pixels.*70 x 40": lambda image, truth: write_tif(image, RGB[:, 1:]),
    "area1.tif cannot be read": lambda image, truth: image.write_bytes(image.read_bytes()[:4000]),
    "top_mosaic_09cm_area1.*--missing-scenes skip": lambda image, truth: truth.unlink(),
    "same scene": lambda image, truth: Image.fromarray(RGB).save(image.with_suffix(".PNG")),
    "area1.tif has the orientation 6": lambda image, truth: Image.fromarray(RGB).save(image, tiffinfo={274: 6}),
}
DESCRIPTIONS = {  # words of the message -> the description
    "too few for one patch of 48": scene_called("1", 48),
    "scene 2 is listed twice": scene_called("2"),
    '"../1" needs another name': scene_called("../1"),
    "another name, .*200": scene_called("a" * 201),
    r"rare_share, crop_side missing in the \[rules\]": RULES,
    "class Bus": f"{RULES}rare_share = 0.1\ncrop_side = [0.3, 0.5]\n",
}


@pytest.mark.parametrize("words", [*FAULTS, *DESCRIPTIONS])
def test_bad_input_is_one_sentence(tmp_path, words):
    raw = small_vaihingen(tmp_path)
    if words in FAULTS:
        FAULTS[words](raw / TOP.format(1), raw / TRUTH.format(1))
    else:
        describe(tmp_path, "small", DESCRIPTIONS[words])
    with refused(words):
        cut(tmp_path)


def test_constants_that_cannot_work(tmp_path):
    foreign = small_vaihingen(tmp_path).parent / "train" / "mine.png"
    foreign.parent.mkdir()
    foreign.touch()
    for constants, words in (
        ({"raw": str(tmp_path / "nowhere")}, "nowhere is missing"),
        ({"seed": -1}, "seed is -1"),
        ({"overwrite": True}, "has no run.json"),
    ):
        with refused(words):
            cut(tmp_path, **constants)
    assert foreign.exists()


def test_skipped_scenes_and_nothing_left(tmp_path, capsys):
    raw = small_vaihingen(tmp_path, areas=("1",))
    with refused("top_mosaic_09cm_area2"):
        cut(tmp_path)
    cut(tmp_path, missing_scenes="skip")
    assert "test: no scenes" in capsys.readouterr().out and patches_of(tmp_path / "datasets" / "small" / "train")
    small_vaihingen(tmp_path, areas=("2",))  # the missing scene arrives: the run continues with it
    cut(tmp_path)
    assert patches_of(tmp_path / "datasets" / "small" / "test")
    for file in raw.rglob("*.tif"):
        file.unlink()
    with refused("raw has no top/"):
        cut(tmp_path, missing_scenes="skip")


def small_isaid(raw: Path, split: str, *names: str, size: int = 20) -> None:
    for name in names:
        truth = f"Semantic_masks/images/{name}_instance_color_RGB"
        for place, colour in ((f"images/{name}", (9, 9, 9)), (truth, (0, 0, 63))):
            file = raw / split / f"{place}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (size, size), colour).save(file)


def test_isaid_messages(tmp_path, capsys):
    describe(tmp_path, "small", 'base = "isaid"\npatch_size = 16\n')
    raw = tmp_path / "datasets" / "small" / "raw"
    with refused("raw is missing"):
        cut(tmp_path, "isaid")
    small_isaid(raw, "train", "P0001", "._P0001")  # the second as archivers of another system write it
    with refused("no scenes in val/images"):
        cut(tmp_path, "isaid")
    small_isaid(raw, "val", "P0002", "P0003")
    (raw / "val/images/P0002.png").unlink()
    (raw / "val/Semantic_masks/images/P0003_instance_color_RGB.png").unlink()
    with refused("val/images/P0002.*val/Semantic_masks/images/P0003_instance_color_RGB"):
        cut(tmp_path, "isaid")
    small_isaid(raw, "train", "P 04")
    with refused('"P 04" needs another name'):
        cut(tmp_path, "isaid")
    for file in raw.rglob("P 04*"):
        file.unlink()
    capsys.readouterr()
    cut(tmp_path, "isaid", missing_scenes="skip")
    assert capsys.readouterr().out.count("patches of 1 scenes") == 1
    small_isaid(raw, "train", "P0001", size=15)
    small_isaid(raw, "val", "P0002", "P0003", size=15)
    with refused("no patch was cut"):
        cut(tmp_path, "isaid", overwrite=True)
    assert "not larger than a patch, skipped: 2" in capsys.readouterr().out


def test_grey_scenes_of_isaid(tmp_path):
    describe(tmp_path, "small", 'base = "isaid"\npatch_size = 16\n')
    raw = tmp_path / "datasets" / "small" / "raw"
    small_isaid(raw, "train", "P1")
    small_isaid(raw, "val", "P2")
    Image.new("L", (20, 20), 7).save(raw / "train" / "images" / "P1.png")
    with refused(r"P1\.png has 1 channel of 8 bits"):
        cut(tmp_path, "isaid")
    cut(tmp_path, "isaid", grey="repeat", overwrite=True)
    patches = patches_of(tmp_path / "datasets" / "small" / "train")
    assert patches and all((pixels == 7).all() for pixels, _ in patches.values())


def test_a_layout_of_ones_own(tmp_path):
    """Scenes in other folders and under other names are cut as those in Vaihingen's layout, without [scenes] too."""
    raw = small_vaihingen(tmp_path)
    cut(tmp_path)
    layout = '[layout]\nimage = "{split}/{scene}_rgb"\ntruth.full = "{split}/{scene}_truth"\n'
    describe(tmp_path, "moved", f'base = "small"\n{layout}folders = {{test = "val"}}\n')
    moved = tmp_path / "datasets" / "moved"
    for area, folder in (("1", "train"), ("2", "val")):
        (moved / "raw" / folder).mkdir(parents=True)
        (raw / TOP.format(area)).rename(moved / "raw" / folder / f"{area}_rgb.tif")
        (raw / TRUTH.format(area)).rename(moved / "raw" / folder / f"{area}_truth.tif")
    cut(tmp_path, dataset="moved")
    expected = {split: digests(tmp_path / "datasets" / "small" / split) for split in SPLITS}
    assert {split: digests(moved / split) for split in SPLITS} == expected
    describe(tmp_path, "small", 'base = "unlisted"\npatch_size = 16\n')
    before, _, behind = (ROOT / "datasetsprocess" / "vaihingen.toml").read_text().partition("[scenes]")
    describe(tmp_path, "unlisted", before + "[rules]" + behind.partition("[rules]")[2])
    cut(tmp_path, dataset="moved", overwrite=True)
    assert {split: digests(moved / split) for split in SPLITS} == expected
    with refused("truth.eroded"):
        cut(tmp_path, dataset="moved", truth="eroded", overwrite=True)


def test_suffixes_in_capitals_and_names_that_are_no_text(tmp_path):
    places = {"train": ("{scene}",), "test": ("{scene}",)}
    for name in ("a.TIF", "b.JPG", "c.Png", "._a.TIF", "a.txt"):
        (tmp_path / name).touch()
    sources = find_sources(tmp_path, {"train": ["a", "b"], "test": ["c"]}, places, "stop")
    assert [source.image.name for source in (*sources["train"], *sources["test"])] == ["a.TIF", "b.JPG", "c.Png"]
    for name in (os.fsdecode(b"d\xff"), "a/../../b"):
        with refused("needs another name"):
            find_sources(tmp_path, {"train": [name]}, places, "stop")


# truths in a palette -----------------------------------------------------------------------------------------------


def palette_scene(tmp_path: Path, entries, numbers: np.ndarray):
    """`read_truth` of a palette image with these colours, in Vaihingen's classes."""
    path = tmp_path / "truth.png"
    image = Image.fromarray(numbers.astype(np.uint8), "P")
    image.putpalette(np.asarray(entries, np.uint8).tobytes())
    image.save(path)
    with Raster(path, KINDS) as truth:
        return read_truth(truth, load_dataset("vaihingen"))


@pytest.mark.parametrize("order", [[3, 2, 1, 0, 5, 4], [0, 1, 2, 3, 4, 5], [4, 1]], ids=str)
def test_a_palette_that_shows_the_classes_is_read_by_colour(tmp_path, order):
    """All classes in another order and in their own, and two classes alone."""
    numbers = np.random.default_rng(0).integers(0, len(order), (300, 20))  # more rows than are decoded at a time
    ids, unknown = palette_scene(tmp_path, load_dataset("vaihingen").colours[order], numbers)
    assert not unknown
    np.testing.assert_array_equal(ids, np.array(order)[numbers])


def test_ignored_unknown_and_255_in_a_palette(tmp_path):
    colours = np.zeros((256, 3), np.uint8)
    colours[:6] = load_dataset("vaihingen").colours[::-1]
    colours[7], colours[255] = (1, 2, 3), (128, 128, 128)  # 6 is black, which Vaihingen ignores
    numbers = np.array([[0, 5, 6, 7, 7, 255]])
    ids, unknown = palette_scene(tmp_path, colours, numbers)
    assert ids.tolist() == [[5, 0, 255, 255, 255, 255]] and unknown == {(1, 2, 3): 2}


def test_a_palette_that_shows_something_else_is_read_by_number(tmp_path):
    numbers = np.array([[0, 1, 5, 5, 6, 255]])
    for entries in (np.arange(256)[:, None].repeat(3, 1), np.random.default_rng(0).integers(1, 250, (256, 3))):
        ids, unknown = palette_scene(tmp_path, entries, numbers)
        assert ids.tolist() == [[0, 1, 5, 5, 255, 255]] and unknown == {6: 1}
    ids, _ = palette_scene(tmp_path, np.arange(256)[:, None].repeat(3, 1), np.zeros((2, 2), int))
    assert not ids.any()  # the black of number 0 is the first grey level here, not Vaihingen's ignored colour


def test_a_palette_that_contradicts_the_numbers_is_refused(tmp_path):
    colours = load_dataset("vaihingen").colours
    with refused("number 0 in the colour of Car, .*class 0 .*ImSurf"):
        palette_scene(tmp_path, [colours[4], (1, 2, 3)], np.array([[0, 1]]))
