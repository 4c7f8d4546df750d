"""Own data: docs/own_data.md followed literally, the splitter of own scenes, and the slips that people make."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image

from datasetsprocess import own_patch_split
from tests.conftest import ROOT
from tests.tiffs import UTM, noise, write_tif
from tools.command import UserError
from tools.dataset import load_dataset
from tools.labels import load_label

BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "docs" / "own_data.md").read_text(encoding="utf-8"), re.M | re.S)
TRAINING = "--backbone resnet18 --weights none --epochs 1 --batch-size 2 --precision fp32 --workers 0"
SMALL = {  # what the test adds to a command of the page, besides --root, so that it ends in seconds and needs no SAM
    "own_patch_split.py": "--workers 0",
    "label_page.py": "",
    "process.py": "--workers 0",
    "get_se_map.py": "--generator felzenszwalb --workers 0",
    "train_classification.py": f"{TRAINING} --train-all",
    "infer_classification.py": "--scales 0.5 1 --precision fp32 --workers 0",
    "make_pseudo_labels.py": "--workers 0",
    "generate_refined_pseudo.py": "--workers 0",
    "train_segmentation.py": f"{TRAINING} --no-freeze-norm --width 16",
    "inference_segmentation.py": "--scales 0.5 1 --precision fp32 --workers 0",
    "segment_scene.py": "--scales 0.5 1 --precision fp32",
    "generate_refined_seg.py": "--workers 0",
    "evaluate_miou.py": "--workers 0",
}


def blocks(language: str, beginning: str = "") -> list[str]:
    return [text for kind, text in BLOCKS if kind == language and text.startswith(beginning)]


def own_scene(path: Path, classes: list[int], colours, size=(256, 512)) -> None:
    """Columns of equal width, one for each class, noisy; the truth in colours beside it where `path` is a truth."""
    ids = np.repeat(classes, -(-size[1] // len(classes)))[: size[1]][None].repeat(size[0], 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = colours[ids].astype(int)
    if path.parent.name == "images":
        pixels = (pixels + np.random.default_rng(0).normal(0, 15, pixels.shape)).clip(0, 255)
    write_tif(path, pixels.astype(np.uint8), **UTM)


def test_the_page_is_followed_literally(tmp_path, monkeypatch, capsys):
    """Folders, description, csv and commands are taken from the page; scenes are made, and SMALL is added."""
    monkeypatch.chdir(tmp_path)
    (description,), (rows,) = blocks("toml"), blocks("csv")
    Path("datasets/fields").mkdir(parents=True)
    Path("datasets/fields/dataset.toml").write_text(description)
    dataset = load_dataset("fields", tmp_path)
    assert dataset.classes == ("field", "forest", "farm") and dataset.patch_size == 256
    shown = {"north": [0, 1, 0, 2], "south": [1, 1, 2, 0], "east": [0, 1, 2]}  # as the csv of the page says of north
    (layout,) = blocks("", "datasets/fields/raw")
    for place in re.findall(r"^datasets/\S+", layout, re.M):
        own_scene(Path(place), shown[Path(place).stem], dataset.colours, (300, 400) if "east" in place else (256, 512))

    commands = [line for text in blocks("", "python ") for line in text.splitlines()]
    assert len(commands) == 14
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    for command in commands:
        _, script, *words = command.split()
        if script.endswith("process.py"):
            fill_in(Path("datasets/fields/train"), rows, {"south_r000_c000": "0,1,0", "south_r000_c001": "1,0,1"})
        more = ["--root", str(tmp_path), *SMALL[Path(script).name].split()]
        monkeypatch.setattr(sys, "argv", [script, *words, *more])
        runpy.run_path(str(ROOT / script), run_name="__main__")

    results = tmp_path / "experiments" / "fields" / "prc"
    assert (results / "scores" / "report.html").stat().st_size > 10_000
    assert len(list((results / "refined_segmentation").glob("east_r*.png"))) == 4  # 300 x 400 takes 2 x 2 patches
    with rasterio.open(results / "scenes" / "east.tif") as scene:
        assert scene.shape == (300, 400) and scene.read(1).max() < 3
        assert scene.crs == UTM["crs"] and scene.transform == UTM["transform"]
    assert (results / "scenes" / "overview" / "east.png").exists()
    assert "fill in" in capsys.readouterr().out


def fill_in(folder: Path, rows: str, others: dict[str, str]) -> None:
    """The csv of the page, with the lines of the patches that it does not show, as image_labels.csv."""
    blank = (folder / "image_labels_blank.csv").read_text().splitlines()
    lines = rows.splitlines() + [f"{id},{values}" for id, values in others.items()]
    assert lines[0] == blank[0] and [line.split(",")[0] for line in lines] == [line.split(",")[0] for line in blank]
    assert all(line.endswith(",0,0,0") for line in blank[1:])
    (folder / "image_labels.csv").write_text("\n".join(lines) + "\n")


# the splitter ------------------------------------------------------------------------------------------------------

TOML = blocks("toml")[0].replace("256", "32")


@pytest.fixture
def fields(tmp_path):
    """The page's data set with patches of 32 px and no scene yet; `fields.cut(**constants)` runs the splitter."""

    class Fields:
        raw, folder = tmp_path / "raw", tmp_path / "datasets" / "fields"

        def scene(self, image, split="train", name="a.tif", truth=None, **options):
            for part, pixels, profile in (("images", image, options), ("labels", truth, {})):
                path = self.raw / split / part / name
                path.parent.mkdir(parents=True, exist_ok=True)
                if pixels is None:
                    continue
                if path.suffix == ".tif":
                    write_tif(path, pixels, **profile)
                else:
                    Image.fromarray(pixels).save(path)

        def cut(self, **constants):
            constants = {"dataset": "fields", "root": tmp_path, "raw": str(self.raw), "workers": 0} | constants
            own_patch_split.main(own_patch_split.Constants(**constants))
            return {path.stem: np.array(Image.open(path)) for path in sorted(self.folder.glob("train/images/*.png"))}

        def ids(self, id):
            return load_label(self.folder / "train" / "labels" / f"{id}.png", 3)

        def describe(self, text):
            (self.folder / "dataset.toml").write_text(text)

    Fields.folder.mkdir(parents=True)
    Fields().describe(TOML)
    return Fields()


def refused(words):
    return pytest.raises(UserError, match=words)


def test_tiles_at_the_border(fields):
    image = noise(70, 96)
    fields.scene(image)
    patches = fields.cut()
    assert list(patches) == [f"a_r{row:03d}_c{column:03d}" for row in range(3) for column in range(3)]
    for id, pixels in patches.items():
        y, x = min(32 * int(id[3:6]), 70 - 32), 32 * int(id[8:])
        np.testing.assert_array_equal(pixels, image[y : y + 32, x : x + 32])
    assert not (fields.folder / "train" / "labels").exists()
    assert len(fields.cut(border="drop", overwrite=True)) == 6
    fields.describe("stride = 20\n" + TOML)
    assert len(fields.cut(overwrite=True)) == 3 * 5


COLOURS = np.array([[220, 200, 60], [0, 120, 0], [200, 0, 0]], np.uint8)


@pytest.mark.parametrize("how", ["colours", "png colours", "grey", "palette png", "palette tif"])
def test_truths_in_colours_and_in_ids(fields, how):
    ids = np.random.default_rng(1).choice([0, 1, 2, 255], (32, 64)).astype(np.uint8)
    table = np.zeros((256, 3), np.uint8)
    table[:3] = COLOURS
    name = "a.png" if "png" in how else "a.tif"
    fields.scene(noise(32, 64), name=name, truth=table[ids] if "colours" in how else ids)
    path = fields.raw / "train" / "labels" / name
    if how == "palette png":
        truth = Image.fromarray(ids, "P")
        truth.putpalette(table.tobytes())  # of a shorter one, Pillow cuts 255 off
        truth.save(path)
    elif how == "palette tif":
        write_tif(path, ids, dict(enumerate(map(tuple, COLOURS.tolist()))))
    assert len(fields.cut()) == 2
    np.testing.assert_array_equal(np.hstack([fields.ids(f"a_r000_c00{c}") for c in range(2)]), ids)


def test_nodata_is_left_out_or_ignored(fields, capsys):
    image, truth = noise(32, 128) // 2 + 1, np.zeros((32, 128), np.uint8)
    image[:, :40] = 7  # one tile wholly, a quarter of the next
    image[:20, 96:] = 7  # more than half of the last
    fields.scene(image, truth=truth, nodata=7)
    assert list(fields.cut()) == ["a_r000_c001", "a_r000_c002"]
    assert "too much nodata, left out: 2" in capsys.readouterr().out
    ids = fields.ids("a_r000_c001")
    assert (ids[:, :8] == 255).all() and (ids[:, 8:] == 0).all()
    assert len(fields.cut(max_nodata=1.0, overwrite=True)) == 3  # without any image never
    fields.scene(image, truth=truth)  # the file says nothing of it
    assert len(fields.cut(overwrite=True)) == 4
    assert len(fields.cut(nodata=7, overwrite=True)) == 2
    alpha = np.where((image == 7).all(-1), 0, 255).astype(np.uint8)
    fields.scene(np.dstack([image, alpha]), truth=truth, photometric="rgb", alpha="yes")
    assert len(fields.cut(overwrite=True)) == 2


def test_grey_scenes_are_repeated_when_asked(fields):
    fields.scene(noise(32, 64)[..., 0], name="a.png")
    with refused(r"a\.png .*--grey repeat"):
        fields.cut()
    patches = fields.cut(grey="repeat", overwrite=True)
    np.testing.assert_array_equal(patches["a_r000_c001"], noise(32, 64)[:, 32:, :1].repeat(3, -1))


def test_labels_written_by_hand_are_never_removed(fields):
    fields.scene(noise(32, 64))
    fields.cut()
    by_hand = fields.folder / "train" / "image_labels.csv"
    by_hand.write_text("hours of work")
    with refused("by hand"):
        fields.cut(overwrite=True)
    fields.cut()
    assert by_hand.read_text() == "hours of work"
    by_hand.unlink()
    fields.scene(noise(32, 64), truth=np.zeros((32, 64), np.uint8))  # a truth that comes later does not join
    with refused("label_maps: False .*--overwrite"):
        fields.cut()
    fields.cut(overwrite=True)
    assert (fields.ids("a_r000_c001") == 0).all()


def test_the_blank_csv_names_every_patch_and_is_not_taken_for_filled_in(fields):
    fields.scene(noise(32, 64))
    fields.cut()
    blank = fields.folder / "train" / "image_labels_blank.csv"
    assert blank.read_text().splitlines()[1:] == ["a_r000_c000,0,0,0", "a_r000_c001,0,0,0"]
    blank.rename(blank.with_name("image_labels.csv"))
    with refused("a_r000_c000 has no class"):
        load_dataset("fields", fields.folder.parents[1]).image_labels("train")


@pytest.mark.parametrize(
    ("image", "truth", "words"),
    [
        (None, None, "raw.train.images has no scenes"),
        (noise(32, 64), noise(32, 64), "colours that are no class: .*JPEG"),
        (noise(32, 64), np.full((32, 64), 3, np.uint8), "a.tif .*3 in 2048 pixels"),
        (noise(32, 64), np.zeros((32, 64), np.uint16), "a.tif has 1 channel of 16 bits"),
        (noise(31, 64), None, "a.tif has 64 x 31 pixels, .*32"),
    ],
    ids=["none", "colours", "number", "16 bits", "small"],
)
def test_slips_with_scenes(fields, image, truth, words):
    if image is not None:
        fields.scene(image, truth=truth)
    with refused(words):
        fields.cut()


@pytest.mark.parametrize("constants", [{"nodata": -2}, {"max_nodata": 1.5}], ids=str)
def test_constants_out_of_range(fields, constants):
    fields.scene(noise(32, 64))
    with refused(f"{next(iter(constants))} is"):
        fields.cut(**constants)


def test_a_scene_without_its_truth_and_in_both_splits(fields):
    fields.scene(noise(32, 64), truth=np.zeros((32, 64), np.uint8))
    fields.scene(noise(32, 64), name="b.tif")
    with refused("train/labels/b"):
        fields.cut()
    assert len(fields.cut(missing_scenes="skip")) == 2
    fields.scene(noise(32, 64), "test", "b.tif")
    with refused("scene b is listed twice"):
        fields.cut(overwrite=True)
    fields.describe("stride = 40\n" + TOML)
    with refused(r"stride is 40 .*32"):
        fields.cut(overwrite=True)
