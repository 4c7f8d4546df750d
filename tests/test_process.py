"""process.py: image-level labels, class frequencies and warnings from label maps, and what does not fit together."""

import os
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from datasetsprocess import process
from datasetsprocess.advice import warnings, wide_pixels
from tools.command import UserError
from tools.dataset import load_dataset
from tools.image_labels import read_image_labels
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


def go(root: Path, **constants) -> None:
    """The script in this process."""
    process.main(process.Constants(**({"dataset": "small", "root": root, "workers": 0} | constants)))


def refused(words: str):
    return pytest.raises(UserError, match=words)


@pytest.mark.parametrize(("number", "workers", "min_pixels"), [(4, 0, 1), (4, 0, 30), (260, 2, 1)])
def test_labels_and_frequencies(tmp_path, capsys, number, workers, min_pixels):
    folder = small(tmp_path, number)
    if min_pixels > 1:  # so that each patch keeps a class
        for path in folder.glob("*/labels/*.png"):
            ids = label_map(path)
            ids[8:] = 2
            save_label(path, ids, load_dataset("small", tmp_path).colours)
    go(tmp_path, workers=workers, min_pixels=min_pixels)
    printed = capsys.readouterr().out
    for split in ("train", "test"):
        maps = {path.stem: label_map(path) for path in (folder / split / "labels").glob("*.png")}
        image_labels = read_image_labels(folder / split / "image_labels.csv", CLASSES, list(maps))
        for id, ids in maps.items():
            np.testing.assert_array_equal(image_labels[id], [np.sum(ids == k) >= min_pixels for k in range(3)])
        table = printed[printed.index(f"{split}: ") :].splitlines()[2:5]
        pixels = [sum(int((ids == k).sum()) for ids in maps.values()) for k in range(3)]
        for k, line in enumerate(table):
            patches = sum(bool(labels[k]) for labels in image_labels.values())
            shares = [f"{100 * patches / number:.1f}%", f"{100 * pixels[k] / sum(pixels):.2f}%"]
            assert line.split()[:4] == [CLASSES[k], str(patches), *shares]
            assert ("next to no pixels" in line) == (pixels[k] / sum(pixels) < 0.001)


def test_works_inside_its_folder_and_again(tmp_path, run_script):
    folder = small(tmp_path)
    run = run_script("process.py", "--dataset", "small", "--root", tmp_path, cwd=SCRIPT.parent)
    assert "next: python PRC_SAM/get_se_map.py --dataset small --root" in run.stdout
    before = (folder / "train" / "image_labels.csv").read_bytes()
    go(tmp_path)
    assert (folder / "train" / "image_labels.csv").read_bytes() == before


def test_a_persons_file_is_kept(tmp_path, capsys):
    folder = small(tmp_path)
    file = folder / "train" / "image_labels.csv"
    text = "id,lawn,road,roof\n" + "".join(f"p{n},1,0,0\n" for n in range(4))
    file.write_text(text)
    with refused("differs from the label maps"):
        go(tmp_path)
    (folder / "train" / "labels").rename(folder / "train" / "not_used")
    go(tmp_path)
    assert "by a person and is kept" in capsys.readouterr().out and file.read_text() == text
    assert (folder / "test" / "image_labels.csv").exists()
    (folder / "train" / "not_used").rename(folder / "train" / "labels")
    go(tmp_path, overwrite=True)
    assert file.read_text() != text


def test_test_split_without_labels(tmp_path, capsys):
    folder = small(tmp_path)
    (folder / "test" / "labels").rename(folder / "away")
    go(tmp_path)
    assert "not scored" in capsys.readouterr().out and not (folder / "test" / "image_labels.csv").exists()
    (folder / "train" / "labels").rename(folder / "away2")
    (folder / "train" / "image_labels.csv").unlink()
    with refused(f"labels is missing.*label_page.py --dataset small --root {tmp_path}"):
        go(tmp_path)


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)  # it would be read for ever


FAULTS = {  # words of the message -> what happens to an image and its label map
    "p1.png has no label map": lambda image, label: label.unlink(),
    "p1.png has no label": lambda image, label: replace_by_pipe(label),
    "p1.png has no image": lambda image, label: image.unlink(),
    "17 x 16": lambda image, label: Image.new("RGB", (17, 16)).save(image),
    "mode L": lambda image, label: Image.new("L", (16, 16)).save(image),
    "p1.png is 255": lambda image, label: Image.new("L", (16, 16), 255).save(label),
    "class id 3": lambda image, label: Image.new("L", (16, 16), 3).save(label),
    "no map of class ids": lambda image, label: Image.new("RGB", (16, 16)).save(label),
    "p1.png cannot be read": lambda image, label: label.write_bytes(b""),
    "extra.jpg": lambda image, label: Image.new("RGB", (16, 16)).save(image.with_name("extra.jpg")),
}


@pytest.mark.parametrize("words", FAULTS)
def test_wrong_files_are_listed(tmp_path, words):
    folder = small(tmp_path)
    FAULTS[words](folder / "train" / "images" / "p1.png", folder / "train" / "labels" / "p1.png")
    with refused(f"1 files do not fit(.|\n)*{words}"):
        go(tmp_path)
    assert not (folder / "train" / "image_labels.csv").exists() and (folder / "test" / "image_labels.csv").exists()


def test_messages(tmp_path):
    folder = small(tmp_path)
    for constants, words in (
        ({"min_pixels": 0}, "min_pixels is 0"),
        ({"min_pixels": 999}, "no class of 999 pixels"),
        ({"dataset": "other"}, "no data set"),
    ):
        with refused(words):
            go(tmp_path, **constants)
    for split in ("train", "test"):
        (folder / split / "images").rename(folder / split / "pictures")
    with refused("holds no png images"):
        go(tmp_path)


# warnings ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def described(tmp_path):
    """described(names) is a data set of these classes."""

    def load(*names: str):
        folder = tmp_path / "datasets" / "-".join(names)
        folder.mkdir(parents=True)
        classes = [f'{{name = "{name}", colour = [{k}, 0, 0]}}' for k, name in enumerate(names)]
        (folder / "dataset.toml").write_text(f"patch_size = 16\nclasses = [{', '.join(classes)}]")
        return load_dataset(folder.name, tmp_path)

    return load


def patches(**groups: int) -> dict[str, np.ndarray]:
    """patches(c110=30, c001=5): 30 patches with the first two of three classes, 5 with the third."""
    rows = [[digit == "1" for digit in name[1:]] for name, count in groups.items() for _ in range(count)]
    return {f"p{n}": np.array(row) for n, row in enumerate(rows)}


def test_good_labels_give_no_warning(described):
    pixels = np.array([[900, 500, 600], [451, 400, 600]])
    for names in (("road", "roof", "lawn"), ("road", "roof", "unlabeled")):  # a large class may be called so
        assert warnings(described(*names), patches(c110=25, c011=25, c100=25, c001=25), pixels) == []


def test_a_class_in_too_many_patches(described):
    dataset = described("road", "roof", "lawn")
    (sentence,) = warnings(dataset, patches(c110=40, c101=41, c011=20) | {"q": np.array([True, False, False])}, None)
    assert "80% of the train patches: road (80.4%)" in sentence and "threshold" not in sentence
    assert warnings(dataset, patches(c110=40, c101=40, c011=20), None) == []  # exactly 80 %


def test_a_background_in_too_many_patches(described, tmp_path):
    """By its usual name, or by [rules], which decide where they are given."""
    labels = patches(c110=40, c101=41, c011=19)
    (sentence,) = warnings(described("Background", "roof", "lawn"), labels, None)
    assert '--background threshold in step 3 (it needs background = "Background"' in sentence
    described("land", "roof", "background")
    file = tmp_path / "datasets" / "land-roof-background" / "dataset.toml"
    file.write_text(file.read_text() + '\n[rules]\nbackground = "land"\n')
    ruled = load_dataset("land-roof-background", tmp_path)
    assert 'background = "land"' in warnings(ruled, labels, None)[0]
    (sentence,) = warnings(ruled, patches(c011=40, c101=41, c110=19), None)
    assert "background (81.0%)" in sentence and "threshold" not in sentence


def test_two_classes_nearly_always_together(described):
    dataset = described("road", "roof", "lawn")
    (sentence,) = warnings(dataset, patches(c110=37, c100=2, c010=2, c001=30), None)
    assert "road and roof (both in 37 of the 41" in sentence
    assert warnings(dataset, patches(c110=36, c100=2, c010=2, c001=30), None) == []  # exactly 90 %
    for labels in (patches(c110=19, c001=40), patches(c110=90, c001=20)):  # both are rare; in 82 %
        assert not any("together" in sentence for sentence in warnings(dataset, labels, None))


def test_a_class_in_too_few_patches(described):
    dataset = described("road", "roof", "lawn")
    (sentence,) = warnings(dataset, patches(c100=20, c010=30, c001=19), None)
    assert "fewer than 20 train patches: lawn (19)" in sentence
    assert "lawn (0)" in warnings(dataset, patches(c100=25, c010=30), None)[0]
    assert warnings(dataset, patches(c100=20, c010=30, c001=20), None) == []


def test_classes_of_narrow_regions_and_of_no_meaning(described):
    labels = patches(c110=25, c011=25, c100=25, c001=25)
    (sentence,) = warnings(described("road", "roof", "lawn"), labels, np.array([[100, 50, 0], [49, 25, 0]]))
    assert "thinner than 16 px: road (51%)" in sentence
    for name in ("Unlabeled", "background", "no_data"):
        (sentence,) = warnings(described("road", "roof", name), labels, np.array([[991, 2000, 30], [991, 2000, 30]]))
        assert f"{name} covers 0.99%" in sentence and "ignore_colours = [[2, 0, 0]]" in sentence
    assert warnings(described("road", "roof", "void"), labels, np.array([[990, 1980, 30]] * 2)) == []  # exactly 1 %


def stripe(width: int, angle: float) -> np.ndarray:
    """Class 1 along a line of this width through a field of class 0, (60,60)."""
    y, x = np.mgrid[:60, :60] - 29.5
    return (np.abs(np.cos(angle) * y + np.sin(angle) * x) <= width / 2).astype(np.uint8)


@pytest.mark.parametrize("angle", [0, 0.3, np.pi / 4, np.pi / 2])
def test_width_of_regions(angle):
    """A line counts as wide from about 16 px on, in any direction; at a corner of the image earlier."""
    for width in (4, 10, 13, 18, 24):
        ids = stripe(width, angle)
        field, line = wide_pixels(ids, 2) / np.bincount(ids.ravel())
        assert field > 0.8 and (line < 0.2 if width < 16 else line > 0.9), width


def test_width_of_shapes():
    ids = np.zeros((60, 60), np.uint8)
    assert wide_pixels(ids, 2).tolist() == [3600, 0]  # one class alone
    ids[10:50, 20:40] = 1  # a block with a thin arm: only the block is wide
    ids[28:32, :20] = 1
    wide, block = wide_pixels(ids, 3), 40 * 20
    assert 0.9 * block < wide[1] < block + 4 * 8 and wide[2] == 0
    ids[:] = 255  # ignored pixels are of no class
    ids[:, :20] = 1
    assert wide_pixels(ids, 2).tolist() == [0, 1200]


def test_warnings_are_printed_for_the_train_split(tmp_path, capsys):
    small(tmp_path)
    go(tmp_path)
    before, _, behind = capsys.readouterr().out.partition("test: ")
    assert "warning: in fewer than 20 train patches: road (" in before and "warning: " not in behind
