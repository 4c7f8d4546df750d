"""Own data: docs/own_data.md followed literally, the splitter of own scenes, and the slips that people make."""

import csv
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image

from datasetsprocess import isaid_split, own_patch_split
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
            for part, pixels in (("images", image), ("labels", truth)):
                if pixels is not None:
                    path = self.raw / split / part / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    if path.suffix.lower() == ".tif":
                        write_tif(path, pixels, **(options if part == "images" else {}))
                    else:
                        Image.fromarray(pixels).save(path)

        def cut(self, module=own_patch_split, **constants):
            constants = {"dataset": "fields", "root": tmp_path, "raw": str(self.raw), "workers": 0} | constants
            module.main(module.Constants(**constants))
            return {path.stem: np.array(Image.open(path)) for path in sorted(self.folder.glob("train/images/*.png"))}

    Fields.folder.mkdir(parents=True)
    (Fields.folder / "dataset.toml").write_text(TOML)
    return Fields()


def ids_of(fields, id):
    return load_label(fields.folder / "train" / "labels" / f"{id}.png", 3)


def test_tiles_at_the_border(fields):
    image = noise(70, 96)
    fields.scene(image)
    found = fields.cut()
    assert list(found) == [f"a_r{row:03d}_c{column:03d}" for row in range(3) for column in range(3)]
    for id, pixels in found.items():
        y, x = min(32 * int(id[3:6]), 70 - 32), 32 * int(id[8:])
        np.testing.assert_array_equal(pixels, image[y : y + 32, x : x + 32])
    assert not (fields.folder / "train" / "labels").exists()
    assert len(fields.cut(border="drop", overwrite=True)) == 6
    (fields.folder / "dataset.toml").write_text("stride = 20\n" + TOML)
    assert len(fields.cut(overwrite=True)) == 3 * 5


COLOURS = np.array([[220, 200, 60], [0, 120, 0], [200, 0, 0]], np.uint8)


@pytest.mark.parametrize("how", ["colours", "png colours", "grey", "palette png", "palette tif"])
def test_truths_in_colours_and_in_ids(fields, how):
    image, ids = noise(32, 64), np.random.default_rng(1).integers(0, 4, (32, 64)).astype(np.uint8)
    rgb, ids = np.vstack([COLOURS, [[0, 0, 0]]])[ids].astype(np.uint8), np.where(ids == 3, 255, ids).astype(np.uint8)
    name = "a.png" if "png" in how else "a.tif"
    if "palette" not in how:
        fields.scene(image, name=name, truth=ids if how == "grey" else rgb)
    else:
        fields.scene(image, name=name, truth=ids)
        path = fields.raw / "train" / "labels" / name
        if name == "a.png":
            truth = Image.fromarray(ids, "P")
            truth.putpalette(COLOURS.tobytes().ljust(768, b"\0"))  # of a shorter one, Pillow cuts 255 off
            truth.save(path)
        else:
            write_tif(path, ids, dict(enumerate(map(tuple, COLOURS.tolist()))))
    assert len(fields.cut()) == 2
    np.testing.assert_array_equal(np.hstack([ids_of(fields, f"a_r000_c00{c}") for c in range(2)]), ids)


def test_a_palette_in_another_order_is_read_by_colour(fields):
    numbers = np.random.default_rng(1).integers(0, 3, (32, 64)).astype(np.uint8)
    fields.scene(noise(32, 64), name="a.png", truth=numbers)
    truth = Image.fromarray(numbers, "P")
    truth.putpalette(COLOURS[::-1].tobytes())
    truth.save(fields.raw / "train" / "labels" / "a.png")
    fields.cut()
    np.testing.assert_array_equal(np.hstack([ids_of(fields, f"a_r000_c00{c}") for c in range(2)]), 2 - numbers)
    truth.putpalette(COLOURS[1].tobytes() + bytes([1, 2, 3, 4, 5, 6]))  # neither the described colours nor in order
    truth.save(fields.raw / "train" / "labels" / "a.png")
    with pytest.raises(UserError, match=r"number 0 in the colour of forest, but class 0 of dataset\.toml is field"):
        fields.cut(overwrite=True)


def test_nodata_is_left_out_or_ignored(fields, capsys):
    image, truth = noise(32, 128) // 2 + 1, np.zeros((32, 128), np.uint8)
    image[:, :40] = 7  # one tile wholly, a quarter of the next
    image[:20, 96:] = 7  # more than half of the last
    fields.scene(image, truth=truth, nodata=7)
    assert list(fields.cut()) == ["a_r000_c001", "a_r000_c002"]
    assert "tiles with too much nodata, left out: 2" in capsys.readouterr().out
    assert (ids_of(fields, "a_r000_c001")[:, :8] == 255).all() and (ids_of(fields, "a_r000_c001")[:, 8:] == 0).all()
    assert len(fields.cut(max_nodata=1.0, overwrite=True)) == 3  # without any image never
    fields.scene(image, truth=truth)  # the file says nothing of it
    assert len(fields.cut(overwrite=True)) == 4
    assert len(fields.cut(nodata=7, overwrite=True)) == 2
    alpha = np.where((image == 7).all(-1), 0, 255).astype(np.uint8)
    fields.scene(np.dstack([image, alpha]), truth=truth, photometric="rgb", alpha="yes")
    assert len(fields.cut(overwrite=True)) == 2


def test_grey_scenes_are_repeated_when_asked(fields):
    fields.scene(noise(32, 64)[..., 0], name="a.png")
    with pytest.raises(UserError, match=r"a\.png has 1 channel of 8 bits"):
        fields.cut()
    found = fields.cut(grey="repeat", overwrite=True)
    np.testing.assert_array_equal(found["a_r000_c001"], noise(32, 64)[:, 32:, :1].repeat(3, -1))


def test_grey_scenes_of_isaid(fields):
    (fields.folder / "dataset.toml").write_text('base = "isaid"\npatch_size = 16\n')
    for split, name in (("train", "P1"), ("val", "P2")):
        truth = fields.raw / split / "Semantic_masks" / "images" / f"{name}_instance_color_RGB.png"
        truth.parent.mkdir(parents=True)
        Image.new("RGB", (32, 32), (0, 0, 63)).save(truth)
        fields.scene(noise(32, 32)[..., 0], split, f"{name}.png")
    with pytest.raises(UserError, match=r"P1\.png has 1 channel of 8 bits"):
        fields.cut(isaid_split)
    found = fields.cut(isaid_split, grey="repeat", overwrite=True)
    assert found and all((pixels == pixels[..., :1]).all() for pixels in found.values())


def test_labels_written_by_hand_are_never_removed(fields):
    fields.scene(noise(32, 64))
    fields.cut()
    by_hand = fields.folder / "train" / "image_labels.csv"
    by_hand.write_text("hours of work")
    with pytest.raises(UserError, match="may be written by hand, and --overwrite would delete it"):
        fields.cut(overwrite=True)
    fields.cut()
    assert by_hand.read_text() == "hours of work"
    by_hand.unlink()
    fields.scene(noise(32, 64), truth=np.zeros((32, 64), np.uint8))  # a truth that comes later does not join
    with pytest.raises(UserError, match=r"label_maps: False there, None now\): --overwrite"):
        fields.cut()
    fields.cut(overwrite=True)
    assert (ids_of(fields, "a_r000_c001") == 0).all()


def test_the_blank_csv_names_every_patch_and_is_not_taken_for_filled_in(fields):
    fields.scene(noise(32, 64))
    fields.cut()
    with open(fields.folder / "train" / "image_labels_blank.csv", newline="") as file:
        assert list(csv.reader(file))[1:] == [["a_r000_c000", "0", "0", "0"], ["a_r000_c001", "0", "0", "0"]]
    (fields.folder / "train" / "image_labels_blank.csv").rename(fields.folder / "train" / "image_labels.csv")
    with pytest.raises(UserError, match="line 2: a_r000_c000 has no class: give it at least one"):
        load_dataset("fields", fields.folder.parents[1]).image_labels("train")


@pytest.mark.parametrize(
    ("image", "truth", "constants", "sentence"),
    [
        (None, None, {}, "raw.train.images has no scenes .*put the large images"),
        (
            noise(32, 64),
            noise(32, 64),
            {},
            "colours that are no class: .*colours usually mean JPEG compression",
        ),
        (noise(32, 64), np.full((32, 64), 3, np.uint8), {}, "a.tif has numbers that are no class: 3 in 2048 pixels"),
        (
            noise(32, 64),
            np.zeros((32, 63), np.uint8),
            {},
            "a.tif has 64 x 32 pixels but .* has 63 x 32",
        ),
        (noise(32, 64), np.zeros((32, 64), np.uint16), {}, "a.tif has 1 channel of 16 bits"),
        (noise(32, 64).astype(np.uint16), None, {}, "a.tif has 3 channels of 16 bits.*-ot Byte -scale"),
        (noise(32, 64).astype(np.float32), None, {}, "a.tif has 3 channels of 32 bits"),
        (noise(31, 64), None, {}, "a.tif has 64 x 31 pixels, too few for one patch of 32"),
        (np.dstack([noise(32, 64)] * 2)[..., :5], None, {}, "a.tif has 5 channels of 8 bits"),
        (np.dstack([noise(32, 64)] * 2)[..., :4], None, {}, "a.tif has a channel that is no alpha of 0 and 255"),
        (noise(32, 64), None, {"nodata": -2}, "nodata is -2"),
        (noise(32, 64), None, {"max_nodata": 1.5}, "max_nodata is 1.5"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_slips_with_scenes(fields, image, truth, constants, sentence):
    if image is not None:
        fields.scene(image, truth=truth)
    with pytest.raises(UserError, match=sentence) as caught:
        fields.cut(**constants)
    assert "Traceback" not in str(caught.value)


def test_a_scene_without_its_truth_and_in_both_splits(fields):
    fields.scene(noise(32, 64), truth=np.zeros((32, 64), np.uint8))
    fields.scene(noise(32, 64), name="b.tif")
    with pytest.raises(UserError, match="raw has no train/labels/b"):
        fields.cut()
    assert len(fields.cut(missing_scenes="skip")) == 2
    fields.scene(noise(32, 64), "test", "b.tif")
    with pytest.raises(UserError, match="the scene b is listed twice"):
        fields.cut(overwrite=True)
    (fields.folder / "dataset.toml").write_text("stride = 40\n" + TOML)
    with pytest.raises(UserError, match=r"stride is 40 .*at most patch_size \(32\)"):
        fields.cut(overwrite=True)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "id;field;forest;farm\na_r000_c000;1;0;0\n",
            "columns are separated by semicolons; save it as a csv with commas",
        ),
        ("id\tfield\tforest\tfarm\n", "columns are separated by tabs"),
        ("sep=,\nid,field,forest,farm\n", "begins with sep=: remove this line"),
        ("id,field,forest\na_r000_c000,1,0\n", "the column of farm is missing"),
        ("id,field,forest,farm,river\n", "dataset.toml has no class river"),
        ("id,Field,forest,farm\n", "Field is called field in dataset.toml; change the name"),
        ("id,field,forest,farm,farm\n", "a class has two columns"),
        ("id,field,forest,farm\na_r000_c000.png,1,0,0\n", "line 2: .*: write a_r000_c000 without the suffix"),
        ("id,field,forest,farm\n01. Jan,1,0,0\n", "line 2: .*has a spreadsheet changed the id"),
        ("id,field,forest,farm\na_r000_c000,yes,no,no\n", "line 2: .* write 1 where the class is in the image"),
        ("id,field,forest,farm\na_r000_c000,1,0,0\n", "has no line for 1 of the images, for example a_r000_c001"),
        ("id,field,forest,farm\n".encode("utf-16"), 'save it as "CSV UTF-8"'),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value[:18].replace("\n", " "),
)
def test_slips_in_the_csv(fields, text, sentence):
    fields.scene(noise(32, 64))
    fields.cut()
    file = fields.folder / "train" / "image_labels.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=sentence):
        load_dataset("fields", fields.folder.parents[1]).image_labels("train")


def test_what_spreadsheets_add_does_no_harm(fields):
    fields.scene(noise(32, 64))
    fields.cut()
    file = fields.folder / "train" / "image_labels.csv"
    file.write_bytes("\ufeffid,field,forest,farm,,\r\na_r000_c000,1,0,0,,\r\na_r000_c001,0,1,1\r\n,,,,,\r\n".encode())
    labels = load_dataset("fields", fields.folder.parents[1]).image_labels("train")
    assert labels["a_r000_c000"].tolist() == [True, False, False] and labels["a_r000_c001"].sum() == 2
