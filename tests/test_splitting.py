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


def decode_by_loop(rgb: np.ndarray, dataset) -> np.ndarray:
    """Independent of the look-up table: one comparison for each class."""
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


def test_saved_patch_keeps_the_order_of_channels(tmp_path):
    image = np.zeros((8, 8, 3), np.uint8)
    image[..., 0], image[:2, :, 1] = 200, 90
    save_image(tmp_path / "a.png", image)
    np.testing.assert_array_equal(read(tmp_path / "a.png"), image)


# tiles and rules ---------------------------------------------------------------------------------------------------


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.integers(1, 40))
def test_whole_tiles_are_exactly_those_that_lie_inside(height, width, patch, stride):
    expected = {
        (r, c) for r in range(90) for c in range(90) if r * stride + patch <= height and c * stride + patch <= width
    }
    tiles = whole_tiles(height, width, patch, stride)
    assert len(tiles) == len(set(tiles)) and set(tiles) == expected and tiles == sorted(tiles)


def test_stride_and_patch_size_of_a_description(tmp_path):
    """A smaller patch size takes the stride with it, and tiles may overlap."""
    describe(tmp_path, "small", 'base = "vaihingen"\npatch_size = 16\n')
    describe(tmp_path, "dense", 'base = "small"\nstride = 24\n')
    assert load_dataset("small", tmp_path).stride == 16 and load_dataset("dense", tmp_path).stride == 24
    describe(tmp_path, "dense", 'base = "vaihingen"\npatch_size = 32\nstride = 16\n')
    scene, image = open_scene(load_dataset("dense", tmp_path), np.zeros((48, 63)), "test", tmp_path)
    found = {place: pixels for place, pixels, _ in vaihingen_patch_split.patches(scene)}
    assert list(found) == ["r000_c000", "r000_c001", "r001_c000", "r001_c001"]
    np.testing.assert_array_equal(found["r001_c001"], image[16:48, 16:48])


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


def test_vaihingen_zooms_in_where_the_rare_class_is(tmp_path):
    describe(tmp_path, "small", 'base = "vaihingen"\npatch_size = 16\n')
    dataset = load_dataset("small", tmp_path)
    ids = np.zeros((32, 48), int)
    ids[:16, 16:32] = 4  # a tile all of cars, every crop of which is above the share
    ids[16:32:4, 32:48:4] = 4  # 1/16 of a tile: no crop of a whole number of periods exceeds 10 %, some others may
    scene, image = open_scene(dataset, ids, "train", tmp_path)
    found = {place: (pixels.copy(), labels.copy()) for place, pixels, labels in vaihingen_patch_split.patches(scene)}
    zoomed = {f"r000_c001_v{version}" for version in range(4)}
    assert zoomed <= found.keys() and "r000_c001" not in found and all((found[place][1] == 4).all() for place in zoomed)
    for place in ("r000_c000", "r000_c002", "r001_c000", "r001_c001"):  # no car: the tile as it is
        y, x = 16 * int(place[1:4]), 16 * int(place[6:])
        np.testing.assert_array_equal(found[place][0], image[y : y + 16, x : x + 16])
        np.testing.assert_array_equal(found[place][1], ids[y : y + 16, x : x + 16])
    # the crop is one of the 6 to 8 pixel wide squares of the tile, enlarged linearly
    tile = image[:16, 16:32]
    crops = [
        cv2.resize(tile[y : y + side, x : x + side], (16, 16), interpolation=cv2.INTER_LINEAR)
        for side in (6, 7, 8)
        for y in range(17 - side)
        for x in range(17 - side)
    ]
    assert any((found["r000_c001_v0"][0] == crop).all() for crop in crops)
    np.testing.assert_array_equal(found["r000_c001_v1"][0], found["r000_c001_v0"][0][::-1])
    np.testing.assert_array_equal(found["r000_c001_v2"][0], found["r000_c001_v0"][0][:, ::-1])
    assert scene.notes["tiles zoomed in and saved in four versions"] == len([p for p in found if p.endswith("_v0")])
    scene.split = "test"
    assert [place for place, *_ in vaihingen_patch_split.patches(scene)] == [f"r00{r}_c00{c}" for r, c in scene.tiles()]


def test_vaihingen_share_must_be_exceeded(tmp_path):
    describe(
        tmp_path,
        "small",
        'base = "vaihingen"\npatch_size = 16\n[rules]\nrare_class = "Car"\nrare_share = 0.25\ncrop_side = [1, 1]\n',
    )  # the crop is the tile itself
    dataset = load_dataset("small", tmp_path)
    ids = np.zeros((16, 32), int)
    ids[:4, :16] = ids[:4, 16:] = 4  # exactly a quarter
    ids[4, 16] = 4  # and one pixel more
    scene, _ = open_scene(dataset, ids, "train", tmp_path)
    places = [place for place, *_ in vaihingen_patch_split.patches(scene)]
    assert places == ["r000_c000", *(f"r000_c001_v{version}" for version in range(4))]


def test_potsdam_drops_tiles_with_too_little_of_a_class(tmp_path):
    describe(tmp_path, "small", 'base = "potsdam"\npatch_size = 20\n')
    dataset = load_dataset("small", tmp_path)
    ids = np.zeros((40, 60), int)
    ids[:2, 20:40] = 1  # exactly 10 %: kept
    ids[:2, 40:60], ids[1, 59] = 1, 0  # one pixel less: dropped
    ids[20:30, 0] = 4  # 10 pixels of car, exactly 2.5 %: kept
    ids[20:29, 20] = 4  # 9 pixels: dropped
    ids[20:40, 40:60] = IGNORE  # ignored pixels are no class
    ids[20:30, 40:60] = 3
    scene, image = open_scene(dataset, ids, "train", tmp_path)
    found = {place: (pixels, labels) for place, pixels, labels in potsdam_patch_split.patches(scene)}
    kept = ["r000_c000", "r000_c001", "r001_c000", "r001_c002"]
    assert list(found) == [f"{place}_v{version}" for place in kept for version in range(4)]
    np.testing.assert_array_equal(found["r000_c001_v0"][0], image[:20, 20:40])
    np.testing.assert_array_equal(found["r000_c001_v1"][1], ids[:20, 20:40][::-1])
    assert scene.notes["tiles dropped, a class below its minimum share"] == 2
    scene.split = "test"
    assert len(list(potsdam_patch_split.patches(scene))) == 6


def test_isaid_counts_tries_and_background(tmp_path):
    describe(tmp_path, "small", 'base = "isaid"\npatch_size = 16\n')
    dataset = load_dataset("small", tmp_path)
    full, image = open_scene(dataset, np.full((40, 50), 9), "train", tmp_path)
    numbers = set()
    for seed in range(12):
        full.seed = seed
        found = list(isaid_split.patches(full))
        numbers.add(len(found))
        assert {place for place, *_ in found} == {f"p{n}" for n in range(len(found))}
        windows = np.lib.stride_tricks.sliding_window_view(image, (16, 16, 3))[:, :, 0]
        assert all((windows == pixels).all((-1, -2, -3)).any() for _, pixels, _ in found)
    assert numbers == {6, 7, 8}
    empty, _ = open_scene(dataset, np.zeros((40, 50)), "train", tmp_path)
    assert not list(isaid_split.patches(empty)) and sum(empty.notes.values()) == 1
    exact, image = open_scene(dataset, np.full((16, 16), 9), "test", tmp_path)
    assert all((pixels == image).all() for _, pixels, _ in isaid_split.patches(exact))
    small, _ = open_scene(dataset, np.full((15, 99), 9), "train", tmp_path)
    assert not list(isaid_split.patches(small)) and small.notes["scenes smaller than a patch, skipped"] == 1
    # background between the two largest shares: 95 % is enough for training, not for testing
    ids = np.zeros((16, 16))
    ids.flat[:13] = 9
    for split, any_found in (("train", True), ("test", False)):
        scene, _ = open_scene(dataset, ids, split, tmp_path)
        assert bool(list(isaid_split.patches(scene))) == any_found


def test_isaid_stops_after_the_tries(tmp_path):
    """Few windows are good: what is found is what the first 100 places of the same random numbers hold."""
    describe(tmp_path, "small", 'base = "isaid"\npatch_size = 16\n')
    dataset = load_dataset("small", tmp_path)
    ids = np.zeros((24, 24))
    ids[0, :8] = 9
    used_up = 0
    for seed in range(150):
        scene, _ = open_scene(dataset, ids, "train", tmp_path, seed)
        random, good = scene.random(), 0
        wanted = random.choice([6, 7, 8])
        for _ in range(100):
            y, x = random.integers(0, 8, endpoint=True), random.integers(0, 8, endpoint=True)
            good += int((ids[y : y + 16, x : x + 16] == 0).mean() < 0.98)
        assert len(list(isaid_split.patches(scene))) == min(good, wanted)
        used_up += good < wanted
    assert used_up


# the real files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, raw, truth",
    [
        ("vaihingen", "isprs/Vaihingen", "gts_for_participants/top_mosaic_09cm_area1.tif"),
        ("potsdam", "isprs/Potsdam", "5_Labels_all/top_potsdam_2_10_label.tif"),
        ("vaihingen", "isprs/Vaihingen", "gts_eroded/top_mosaic_09cm_area1_noBoundary.tif"),
        ("potsdam", "isprs/Potsdam", "5_Labels_all_noBoundary/top_potsdam_2_10_label_noBoundary.tif"),
    ],
)
def test_class_counts_of_real_isprs_tiles(shared_data, tmp_path, run_script, name, raw, truth):
    """As a test scene: the patches are all whole tiles, pixel for pixel; their class counts those of another decode."""
    described = load_dataset(name)
    scene = described.scenes["train"][0]
    describe(tmp_path, "real", f'base = "{name}"\n[scenes]\ntrain = []\ntest = ["{scene}"]\n')
    run_script(
        script(name),
        "--dataset",
        "real",
        "--root",
        tmp_path,
        "--raw",
        shared_data / raw,
        "--truth",
        "eroded" if "noBoundary" in truth else "full",
    )
    found = patches_of(tmp_path / "datasets" / "real" / "test")
    colours = read(shared_data / raw / truth)
    place = TOP.format("1") if name == "vaihingen" else "2_Ortho_RGB/top_potsdam_2_10_RGB.tif"
    image = read(shared_data / raw / place)
    ids, size = decode_by_loop(colours, described), described.patch_size
    whole = (len(ids) // size * size, ids.shape[1] // size * size)
    counts = sum(np.bincount(labels.ravel(), minlength=256) for _, labels in found.values())
    np.testing.assert_array_equal(counts, np.bincount(ids[: whole[0], : whole[1]].ravel(), minlength=256))
    assert len(found) == (512 // size) ** 2 and ("noBoundary" in truth) == bool(counts[IGNORE])
    for id, (pixels, labels) in found.items():
        row, column = (int(part[1:]) * size for part in id.removeprefix(f"{scene}_").split("_"))
        np.testing.assert_array_equal(pixels, image[row : row + size, column : column + size])
        np.testing.assert_array_equal(labels, ids[row : row + size, column : column + size])
    assert (tmp_path / "datasets" / "real" / "test" / "contact_sheet.png").exists()


def test_real_isaid_patches_are_windows_of_their_scenes(shared_data, tmp_path, run_script):
    """Whole scenes: each patch and its label are the same window of image and independently decoded truth."""
    run_script(script("isaid"), "--root", tmp_path, "--raw", shared_data / "isaid_originals")
    dataset = load_dataset("isaid")
    for split, raw, largest in (("train", "train", 0.98), ("test", "val", 0.90)):
        folder, found = shared_data / "isaid_originals" / raw, patches_of(tmp_path / "datasets" / "isaid" / split)
        scenes = {path.stem for path in (folder / "images").glob("*.png")}
        assert {id.split("_")[0] for id in found} == scenes
        for scene in scenes:
            image = read(folder / "images" / f"{scene}.png")
            ids = decode_by_loop(read(folder / "Semantic_masks/images" / f"{scene}_instance_color_RGB.png"), dataset)
            runs = np.lib.stride_tricks.sliding_window_view(image[..., 0], 16, axis=1)
            for pixels, labels in (found[id] for id in found if id.startswith(scene)):
                at = [
                    (y, x)
                    for y, x in np.argwhere((runs == pixels[0, :16, 0]).all(-1))
                    if np.array_equal(image[y : y + 512, x : x + 512], pixels)
                ]
                assert len(at) == 1
                np.testing.assert_array_equal(labels, ids[at[0][0] : at[0][0] + 512, at[0][1] : at[0][1] + 512])
                assert (labels == 0).mean() < largest


def test_class_counts_of_real_isaid_tiles(shared_data, tmp_path, run_script):
    """Scenes of exactly a patch: every patch is the scene, so class counts are those of an independent decode."""
    tiles, raw = shared_data / "isaid_tiles", tmp_path / "raw"
    dataset = load_dataset("isaid")
    for split in ("train", "val"):
        for kind in ("images", "Semantic_masks/images"):
            (raw / split / kind).mkdir(parents=True)
        for image in sorted((tiles / split / "images").glob("*.jpg"))[:4]:
            truth = f"Semantic_masks/images/{image.stem}_instance_color_RGB.png"
            (raw / split / "images" / image.name).symlink_to(image)
            (raw / split / truth).symlink_to(tiles / split / truth)
    run_script(script("isaid"), "--root", tmp_path, "--raw", raw)
    for split, folder in (("train", "train"), ("test", "val")):
        found = patches_of(tmp_path / "datasets" / "isaid" / split)
        assert found
        for name in {id.split("_")[0] for id in found}:
            truth = raw / folder / "Semantic_masks/images" / f"{name}_instance_color_RGB.png"
            ids = decode_by_loop(read(truth), dataset)
            image = read(raw / folder / "images" / f"{name}.jpg")
            for pixels, labels in (found[id] for id in found if id.startswith(f"{name}_")):
                np.testing.assert_array_equal(np.bincount(labels.ravel()), np.bincount(ids.ravel()))
                np.testing.assert_array_equal(pixels, image)


# runs --------------------------------------------------------------------------------------------------------------


def test_same_bytes_with_any_workers_and_others_with_another_seed(tmp_path, run_script):
    results = {}
    for name, workers, seed in (("none", 0, 0), ("one", 1, 0), ("two", 2, 0), ("other", 0, 1)):
        root = tmp_path / name
        small_vaihingen(root, areas=("1", "2", "3", "4"))
        scenes = '[scenes]\ntrain = ["1", "3", "4"]\ntest = ["2"]\n'
        describe(root, "small", f'base = "vaihingen"\npatch_size = 16\n{scenes}')
        folder = ROOT if name != "one" else ROOT / "datasetsprocess"  # from both working directories
        run_script(
            script("vaihingen") if name != "one" else SCRIPTS["vaihingen"],
            "--dataset",
            "small",
            "--root",
            root,
            "--workers",
            workers,
            "--seed",
            seed,
            cwd=folder,
        )
        results[name] = digests(root / "datasets" / "small")
    assert results["none"] == results["one"] == results["two"]
    assert any("_v0" in name for name in results["none"])
    assert results["none"] != results["other"]
    assert all(results["other"][name] == digest for name, digest in results["none"].items() if name.startswith("test/"))


def test_continues_refuses_other_settings_and_overwrites(tmp_path, run_script):
    raw = small_vaihingen(tmp_path)
    folder = tmp_path / "datasets" / "small"
    command = (script("vaihingen"), "--dataset", "small", "--root", tmp_path, "--workers", 0)
    run_script(*command)
    before, account = digests(folder), json.loads((folder / "train" / "run.json").read_text())
    assert account["finished"] and account["files"] == len(list((folder / "train" / "images").glob("*.png")))
    # as after a kill: a scene begun but not accounted for, with a patch that the finished scene will not have
    (folder / "train" / "scenes" / "1.json").unlink()
    images = sorted((folder / "train" / "images").glob("*.png"))
    images[0].unlink()
    (folder / "train" / "images" / "1_r090_c000.png").write_bytes(images[1].read_bytes())
    (folder / "train" / "labels" / ".1_r000_c000.123.tmp.png").write_bytes(b"half")
    run_script(*command)
    assert digests(folder) == before
    refused = run_script(*command, "--seed", 1, fails=True)
    assert "seed: 0 there, 1 now" in refused.stderr and "--overwrite" in refused.stderr and digests(folder) == before
    describe(tmp_path, "small", 'base = "vaihingen"\npatch_size = 32\n[scenes]\ntrain = ["1"]\ntest = ["2"]\n')
    refused = run_script(*command, fails=True)
    assert "patch_size: 16 there, 32 now" in refused.stderr
    run_script(*command, "--overwrite")
    assert {len(labels) for _, labels in patches_of(folder / "train").values()} == {32}
    os.utime(raw / TOP.format(2))  # as if exported again under the same name
    replaced = run_script(*command, fails=True)
    assert "area2.tif or its truth was replaced" in replaced.stderr and "--overwrite" in replaced.stderr
    assert (raw / TOP.format(1)).exists() and (folder / "dataset.toml").exists()


def colour_some_pixels(raw: Path, area: str, colours) -> None:
    file = raw / TRUTH.format(area)
    rgb = read(file)
    for pixel, colour in enumerate(colours):
        rgb[0, pixel] = colour
    write_tif(file, rgb)


def test_unknown_colours_stop_or_become_ignore(tmp_path, run_script):
    raw = small_vaihingen(tmp_path)
    colour_some_pixels(raw, "2", [(1, 2, 3), (9, 9, 9), (1, 2, 3)])
    command = (script("vaihingen"), "--dataset", "small", "--root", tmp_path, "--workers", 0)
    stopped = run_script(*command, fails=True)
    for part in ("area2.tif", "(1, 2, 3) in 2 pixels, (9, 9, 9) in 1 pixels", "--unknown-colours ignore"):
        assert part in stopped.stderr
    folder = tmp_path / "datasets" / "small"
    assert len(patches_of(folder / "train")) > 0 and not patches_of(folder / "test")  # the good scene is done
    run = run_script(*command, "--unknown-colours", "ignore", "--overwrite")
    assert "pixels of unknown colours, set to 255: 3" in run.stdout
    labels = patches_of(folder / "test")["2_r000_c000"][1]
    assert (labels == IGNORE).sum() == 3 and (labels[0, :3] == IGNORE).all()


def test_tiles_without_any_labelled_pixel_are_left_out(tmp_path, run_script):
    raw = small_vaihingen(tmp_path)
    rgb = read(raw / TRUTH.format(2))
    rgb[:16, :16] = 0  # the eroded boundary's black
    write_tif(raw / TRUTH.format(2), rgb)
    run = run_script(script("vaihingen"), "--dataset", "small", "--root", tmp_path, "--workers", 0)
    assert "patches without any labelled pixel, left out: 1" in run.stdout
    tiles = {f"2_r00{r}_c00{c}" for r in range(2) for c in range(4)}
    assert set(patches_of(tmp_path / "datasets" / "small" / "test")) == tiles - {"2_r000_c000"}


def break_small(how: str, root: Path) -> list:
    """Make the small data set bad in one way; returns further arguments of the command."""
    raw = root / "datasets" / "small" / "raw"
    image, toml = raw / TOP.format(1), 'base = "vaihingen"\npatch_size = 16\n[scenes]\n'
    if how == "no raw":
        return ["--raw", root / "nowhere"]
    if how == "grey":
        write_tif(image, np.zeros((40, 70), np.uint8))
    elif how == "sizes":
        write_tif(image, np.zeros((40, 71, 3), np.uint8))
    elif how == "short":
        image.write_bytes(image.read_bytes()[:4000])
    elif how == "no truth":
        (raw / TRUTH.format(1)).unlink()
    elif how == "twice":
        Image.fromarray(np.zeros((40, 70, 3), np.uint8)).save(image.with_suffix(".PNG"))
    elif how == "pipe":
        image.unlink()
        os.mkfifo(image)
    elif how == "turned":
        Image.fromarray(np.zeros((40, 70, 3), np.uint8)).save(image, tiffinfo={274: 6})
    elif how == "long name":
        describe(root, "small", toml + f'train = ["{"a" * 201}"]\ntest = ["2"]\n')
    elif how == "large patch":
        describe(root, "small", toml.replace("16", "48") + 'train = ["1"]\ntest = ["2"]\n')
    elif how == "both splits":
        describe(root, "small", toml + 'train = ["1"]\ntest = ["1"]\n')
    elif how == "path":
        describe(root, "small", toml + 'train = ["../1"]\ntest = ["2"]\n')
    elif how == "rules":
        describe(root, "small", 'base = "vaihingen"\n[rules]\nrare_class = "Car"\n')
    elif how == "class":
        rules = 'rare_class = "Bus"\nrare_share = 0.1\ncrop_side = [0.3, 0.5]\n'
        describe(root, "small", f'base = "vaihingen"\n[rules]\n{rules}')
    elif how == "foreign":
        (root / "datasets" / "small" / "train").mkdir()
        (root / "datasets" / "small" / "train" / "mine.png").touch()
        return ["--overwrite"]
    elif how == "seed":
        return ["--seed", -1]
    return []


@pytest.mark.parametrize(
    "how, parts",
    [
        ("no raw", ["nowhere is missing: unpack"]),
        ("grey", ["area1.tif has 1 channel of 8 bits", "--grey repeat", "gdal_translate -b 1 -b 1 -b 1"]),
        ("sizes", ["area1.tif has 71 x 40 pixels", "has 70 x 40"]),
        ("short", ["area1.tif"]),
        ("no truth", ["has no gts_for_participants/top_mosaic_09cm_area1", "--missing-scenes skip"]),
        ("twice", ["are the same scene: remove one"]),
        ("large patch", ["too few for one patch of 48"]),
        ("both splits", ["the scene 1 is listed twice"]),
        ("path", ['the scene "../1" needs another name']),
        ("long name", ["needs another name, of at most 200 letters"]),
        ("pipe", ["area1.tif is not a regular file"]),
        ("turned", ["area1.tif has the orientation 6"]),
        ("rules", ["rare_share, crop_side missing in the [rules]"]),
        ("class", ["name the class Bus"]),
        ("foreign", ["has no run.json", "move it away"]),
        ("seed", ["seed is -1, but it must be at least 0"]),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, run_script, how, parts):
    small_vaihingen(tmp_path)
    arguments = break_small(how, tmp_path)
    result = run_script(
        script("vaihingen"), "--dataset", "small", "--root", tmp_path, "--workers", 0, *arguments, fails=True
    )
    for part in parts:
        assert part in result.stderr, result.stderr


def test_skipped_scenes_and_nothing_left(tmp_path, run_script):
    raw = small_vaihingen(tmp_path, areas=("1",))
    command = (script("vaihingen"), "--dataset", "small", "--root", tmp_path, "--workers", 0)
    assert "top_mosaic_09cm_area2" in run_script(*command, fails=True).stderr
    run = run_script(*command, "--missing-scenes", "skip")
    assert "test: no scenes" in run.stdout and (tmp_path / "datasets" / "small" / "train" / "images").is_dir()
    small_vaihingen(tmp_path, areas=("2",))  # the missing scene arrives: the run continues with it
    run_script(*command)
    assert patches_of(tmp_path / "datasets" / "small" / "test")
    for file in raw.rglob("*.tif"):
        file.unlink()
    assert "raw has no top/" in run_script(*command, "--missing-scenes", "skip", fails=True).stderr


def small_isaid(raw: Path, names: dict[str, str], size: int = 20) -> None:
    for name, split in names.items():
        truth = f"Semantic_masks/images/{name}_instance_color_RGB"
        for place, colour in ((f"images/{name}", (9, 9, 9)), (truth, (0, 0, 63))):
            file = raw / split / f"{place}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (size, size), colour).save(file)


def test_isaid_messages(tmp_path, run_script):
    describe(tmp_path, "small", 'base = "isaid"\npatch_size = 16\n')
    raw = tmp_path / "datasets" / "small" / "raw"
    command = (script("isaid"), "--dataset", "small", "--root", tmp_path, "--workers", 0)
    assert "raw is missing: unpack" in run_script(*command, fails=True).stderr
    small_isaid(raw, {"P0001": "train"})
    assert "has no scenes in val/images" in run_script(*command, fails=True).stderr
    small_isaid(raw, {"P0002": "val", "P0003": "val"})
    (raw / "val/images/P0002.png").unlink()
    (raw / "val/Semantic_masks/images/P0003_instance_color_RGB.png").unlink()
    missing = run_script(*command, fails=True).stderr
    assert "val/images/P0002" in missing and "val/Semantic_masks/images/P0003_instance_color_RGB" in missing
    small_isaid(raw, {"._P0001": "train"})  # as archivers of another system leave them
    small_isaid(raw, {"P 04": "train"})
    assert '"P 04" needs another name' in run_script(*command, fails=True).stderr
    for file in raw.rglob("P 04*"):
        file.unlink()
    assert run_script(*command, "--missing-scenes", "skip").stdout.count("patches of 1 scenes") == 1
    small_isaid(raw, {"P0001": "train", "P0002": "val", "P0003": "val"}, size=15)
    nothing = run_script(*command, "--overwrite", fails=True)
    assert "scenes smaller than a patch, skipped: 2" in nothing.stdout and "no patch was cut" in nothing.stderr


def test_a_layout_of_ones_own(tmp_path, run_script):
    """Scenes in other folders and under other names are cut as those in Vaihingen's layout, without [scenes] too."""
    raw = small_vaihingen(tmp_path)
    run_script(script("vaihingen"), "--dataset", "small", "--root", tmp_path)
    layout = '[layout]\nimage = "{split}/{scene}_rgb"\ntruth.full = "{split}/{scene}_truth"\n'
    describe(tmp_path, "moved", f'base = "small"\n{layout}folders = {{test = "val"}}\n')
    for area, folder in (("1", "train"), ("2", "val")):
        (tmp_path / "datasets" / "moved" / "raw" / folder).mkdir(parents=True)
        for place, kind in ((TOP, "rgb"), (TRUTH, "truth")):
            file = raw / place.format(area)
            file.rename(tmp_path / "datasets" / "moved" / "raw" / folder / f"{area}_{kind}.tif")
    command = [script("vaihingen"), "--dataset", "moved", "--root", tmp_path]
    run_script(*command)
    expected = {split: digests(tmp_path / "datasets" / "small" / split) for split in SPLITS}
    assert {split: digests(tmp_path / "datasets" / "moved" / split) for split in SPLITS} == expected
    file = tmp_path / "datasets" / "small" / "dataset.toml"
    file.write_text(file.read_text().partition("[scenes]")[0].replace('"vaihingen"', '"unlisted"'))
    vaihingen = (ROOT / "datasetsprocess" / "vaihingen.toml").read_text()
    before, _, behind = vaihingen.partition("[scenes]")
    describe(tmp_path, "unlisted", before + "[rules]" + behind.partition("[rules]")[2])
    run_script(*command, "--overwrite")
    assert {split: digests(tmp_path / "datasets" / "moved" / split) for split in SPLITS} == expected
    assert "truth.eroded" in run_script(*command, "--truth", "eroded", "--overwrite", fails=True).stderr


def test_sources_stay_inside_their_folder(tmp_path):
    with pytest.raises(UserError, match="needs another name"):
        find_sources(tmp_path, {"train": ["a/../../b"]}, dict.fromkeys(SPLITS, ("{scene}", "{scene}")), "stop")


def test_suffixes_in_capitals_and_names_that_are_no_text(tmp_path):
    places = {"train": ("{scene}",), "test": ("{scene}",)}
    for name in ("a.TIF", "b.JPG", "c.Png", "._a.TIF", "a.txt"):
        (tmp_path / name).touch()
    found = find_sources(tmp_path, {"train": ["a", "b"], "test": ["c"]}, places, "stop")
    assert [source.image.name for source in (*found["train"], *found["test"])] == ["a.TIF", "b.JPG", "c.Png"]
    not_text = os.fsdecode(b"d\xff")
    with pytest.raises(UserError, match="needs another name"):
        find_sources(tmp_path, {"train": [not_text]}, places, "stop")


# truths in a palette -----------------------------------------------------------------------------------------------

PALETTES = {  # what a palette shows -> its first entries, and number -> class id or what it is called
    "all classes, another order": ([3, 2, 1, 0, 5, 4], lambda k: [3, 2, 1, 0, 5, 4][k]),
    "all classes, own order": ([0, 1, 2, 3, 4, 5], lambda k: k),
    "two classes alone": ([4, 1], lambda k: [4, 1][k]),
}


def palette_scene(tmp_path: Path, entries, numbers: np.ndarray):
    """`read_truth` of a palette image with these colours, in Vaihingen's classes."""
    path = tmp_path / "truth.png"
    image = Image.fromarray(numbers.astype(np.uint8), "P")
    image.putpalette(np.asarray(entries, np.uint8).tobytes())
    image.save(path)
    with Raster(path, KINDS) as truth:
        return read_truth(truth, load_dataset("vaihingen"))


@pytest.mark.parametrize("how", PALETTES)
def test_a_palette_that_shows_the_classes_is_read_by_colour(tmp_path, how):
    order, expected = PALETTES[how]
    numbers = np.random.default_rng(0).integers(0, len(order), (300, 20))  # more rows than are decoded at a time
    ids, unknown = palette_scene(tmp_path, load_dataset("vaihingen").colours[order], numbers)
    assert not unknown
    np.testing.assert_array_equal(ids, np.vectorize(expected)(numbers))


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
    with pytest.raises(UserError, match=r"number 0 in the colour of Car, but class 0 of dataset\.toml is ImSurf"):
        palette_scene(tmp_path, [colours[4], (1, 2, 3)], np.array([[0, 1]]))
