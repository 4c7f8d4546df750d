"""process.py: image-level labels and class frequencies from label maps, and what does not fit together."""

import csv
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from tools.dataset import load_dataset, read_image_labels
from tools.labels import save_label

SCRIPT = ROOT / "datasetsprocess" / "process.py"
CLASSES = ("road", "roof", "lawn")
TOML = """patch_size = 16
classes = [
  {name = "road", colour = [9, 9, 9]}, {name = "roof", colour = [200, 0, 0]}, {name = "lawn", colour = [0, 200, 0]}
]
"""


def small(root: Path, number: int = 4, size: int = 16) -> Path:
    """A data set "small" of random label maps in both splits, with ignored pixels; returns its folder."""
    folder, random = root / "datasets" / "small", np.random.default_rng(0)
    folder.mkdir(parents=True)
    (folder / "dataset.toml").write_text(TOML)
    colours = load_dataset("small", root).colours
    for split in ("train", "test"):
        (folder / split / "images").mkdir(parents=True)
        for n in range(number):
            shares = random.dirichlet([0.15, 0.01, 0.15, 0.1])
            ids = random.choice([0, 1, 2, 255], (size, size), p=shares).astype(np.uint8)
            ids[0, 0] = n % 3
            save_label(folder / split / "labels" / f"p{n}.png", ids, colours)
            pixels = random.integers(0, 256, (size, size, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / split / "images" / f"p{n}.png")
    return folder


def label_map(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


@pytest.mark.parametrize("number, workers, min_pixels", [(4, 0, 1), (4, 0, 30), (260, 2, 1)])
def test_labels_and_frequencies(tmp_path, run_script, number, workers, min_pixels):
    folder = small(tmp_path, number)
    if min_pixels > 1:  # so that each patch keeps a class
        for path in folder.glob("*/labels/*.png"):
            ids = label_map(path)
            ids[8:] = 2
            save_label(path, ids, load_dataset("small", tmp_path).colours)
    run = run_script(SCRIPT, "--dataset", "small", "--root", tmp_path, "--workers", workers, "--min-pixels", min_pixels)
    for split in ("train", "test"):
        maps = {path.stem: label_map(path) for path in (folder / split / "labels").glob("*.png")}
        found = read_image_labels(folder / split / "image_labels.csv", CLASSES, list(maps))
        for id, ids in maps.items():
            np.testing.assert_array_equal(found[id], [np.sum(ids == k) >= min_pixels for k in range(3)])
        table = run.stdout[run.stdout.index(f"{split}: ") :].splitlines()[2:5]
        pixels = [sum(int((ids == k).sum()) for ids in maps.values()) for k in range(3)]
        for k, line in enumerate(table):
            patches = sum(bool(labels[k]) for labels in found.values())
            shares = f"{100 * patches / number:.1f}%", f"{100 * pixels[k] / sum(pixels):.2f}%"
            assert line.split()[: 2 + len(shares)] == [CLASSES[k], str(patches), *shares]
            assert line.endswith("in every patch, so hard to locate") == (patches == number)


def test_works_inside_its_folder_and_again(tmp_path, run_script):
    folder = small(tmp_path)
    run_script("process.py", "--dataset", "small", "--root", tmp_path, cwd=SCRIPT.parent)
    before = (folder / "train" / "image_labels.csv").read_bytes()
    run_script(SCRIPT, "--dataset", "small", "--root", tmp_path)
    assert (folder / "train" / "image_labels.csv").read_bytes() == before
    rows = list(csv.reader(before.decode().splitlines()))
    assert rows[0] == ["id", *CLASSES] and [row[0] for row in rows[1:]] == ["p0", "p1", "p2", "p3"]


def test_a_persons_file_is_kept(tmp_path, run_script):
    folder = small(tmp_path)
    file = folder / "train" / "image_labels.csv"
    text = "id,lawn,road,roof\n" + "".join(f"p{n},1,0,0\n" for n in range(4))
    file.write_text(text)
    refused = run_script(SCRIPT, "--dataset", "small", "--root", tmp_path, fails=True)
    assert "says something else" in refused.stderr and file.read_text() == text
    (folder / "train" / "labels").rename(folder / "train" / "not_used")
    run = run_script(SCRIPT, "--dataset", "small", "--root", tmp_path)
    assert "was written by a person and is kept" in run.stdout and file.read_text() == text
    assert (folder / "test" / "image_labels.csv").exists()
    (folder / "train" / "not_used").rename(folder / "train" / "labels")
    run_script(SCRIPT, "--dataset", "small", "--root", tmp_path, "--overwrite")
    assert file.read_text() != text


def test_test_split_without_labels(tmp_path, run_script):
    folder = small(tmp_path)
    (folder / "test" / "labels").rename(folder / "away")
    run = run_script(SCRIPT, "--dataset", "small", "--root", tmp_path)
    assert "segmented but not scored" in run.stdout and not (folder / "test" / "image_labels.csv").exists()
    (folder / "train" / "labels").rename(folder / "away2")
    (folder / "train" / "image_labels.csv").unlink()
    assert "labels is missing" in run_script(SCRIPT, "--dataset", "small", "--root", tmp_path, fails=True).stderr


def break_small(how: str, folder: Path) -> None:
    image, label = folder / "train" / "images" / "p1.png", folder / "train" / "labels" / "p1.png"
    if how == "no label":
        label.unlink()
    elif how == "no image":
        image.unlink()
    elif how == "size":
        Image.new("RGB", (17, 16)).save(image)
    elif how == "grey":
        Image.new("L", (16, 16)).save(image)
    elif how == "ignored":
        Image.new("L", (16, 16), 255).save(label)
    elif how == "id":
        Image.new("L", (16, 16), 3).save(label)
    elif how == "colours":
        Image.new("RGB", (16, 16)).save(label)
    elif how == "short":
        image.write_bytes(image.read_bytes()[:200])
    elif how == "empty":
        label.write_bytes(b"")
    elif how == "jpg":
        Image.new("RGB", (16, 16)).save(image.with_name("extra.jpg"))


@pytest.mark.parametrize(
    "how, part",
    [
        ("no label", "p1.png has no label map"),
        ("no image", "p1.png has no image"),
        ("size", "but its image has 17 x 16"),
        ("grey", "mode L, not 8-bit RGB"),
        ("ignored", "p1.png is 255 (ignore) everywhere"),
        ("id", "holds the class id 3"),
        ("colours", "not a map of class ids"),
        ("short", "p1.png cannot be read"),
        ("empty", "p1.png cannot be read"),
        ("jpg", "extra.jpg is no png"),
    ],
)
def test_wrong_files_are_listed(tmp_path, run_script, how, part):
    folder = small(tmp_path)
    break_small(how, folder)
    result = run_script(SCRIPT, "--dataset", "small", "--root", tmp_path, fails=True)
    assert part in result.stderr and "1 files do not fit" in result.stderr
    assert not (folder / "train" / "image_labels.csv").exists() and (folder / "test" / "image_labels.csv").exists()


def test_messages(tmp_path, run_script):
    folder = small(tmp_path)
    command = (SCRIPT, "--dataset", "small", "--root", tmp_path)
    assert "min_pixels is 0" in run_script(*command, "--min-pixels", 0, fails=True).stderr
    assert "no class of 999 pixels" in run_script(*command, "--min-pixels", 999, fails=True).stderr
    assert "there is no data set" in run_script(SCRIPT, "--dataset", "other", "--root", tmp_path, fails=True).stderr
    for split in ("train", "test"):
        (folder / split / "images").rename(folder / split / "pictures")
    assert "holds no png images" in run_script(*command, fails=True).stderr
