"""process.py: image-level labels, class frequencies and warnings from label maps, and what does not fit together."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from datasetsprocess.advice import warnings, wide_pixels
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
            assert line.endswith("  next to no pixels") == (pixels[k] / sum(pixels) < 0.001)
    assert run.stdout.splitlines()[-2].startswith("next: python PRC_SAM/get_se_map.py --dataset small --root")


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
    assert "differs from the label maps" in refused.stderr and file.read_text() == text
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
    refused = run_script(SCRIPT, "--dataset", "small", "--root", tmp_path, fails=True).stderr
    assert "labels is missing" in refused and f"label_page.py --dataset small --root {tmp_path}, or cut" in refused


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
    elif how == "pipe":  # it would be read for ever
        label.unlink()
        os.mkfifo(label)


@pytest.mark.parametrize(
    "how, part",
    [
        ("no label", "p1.png has no label map"),
        ("no image", "p1.png has no image"),
        ("size", "but its image has 17 x 16"),
        ("grey", "mode L and 8 bits"),
        ("ignored", "p1.png is 255 (ignore) everywhere"),
        ("id", "holds the class id 3"),
        ("colours", "no map of class ids"),
        ("short", "p1.png cannot be read"),
        ("empty", "p1.png cannot be read"),
        ("jpg", "extra.jpg is no png"),
        ("pipe", "p1.png has no label map"),
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
    os.mkfifo(folder / "train" / "images" / "pipe.png")
    assert "pipe.png is not a regular file" in run_script(*command, fails=True).stderr
    for split in ("train", "test"):
        (folder / split / "images").rename(folder / split / "pictures")
    assert "holds no png images" in run_script(*command, fails=True).stderr


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
    labels = patches(c110=40, c101=41, c011=20)
    (found,) = warnings(dataset, labels | {"q": np.array([True, False, False])}, None)
    assert "in more than 80% of the train patches: road (80.4%)." in found and "Cut smaller patches" in found
    assert warnings(dataset, patches(c110=40, c101=40, c011=20), None) == []  # exactly 80 %
    assert "threshold" not in found


def test_a_background_in_too_many_patches(described, tmp_path):
    """By its usual name, or by [rules], which decide where they are given."""
    labels = patches(c110=40, c101=41, c011=19)
    (found,) = warnings(described("Background", "roof", "lawn"), labels, None)
    assert 'compare --background threshold in step 3 (it needs background = "Background" in [rules]' in found
    described("land", "roof", "background")
    file = tmp_path / "datasets" / "land-roof-background" / "dataset.toml"
    file.write_text(file.read_text() + '\n[rules]\nbackground = "land"\n')
    ruled = load_dataset("land-roof-background", tmp_path)
    assert 'needs background = "land"' in warnings(ruled, labels, None)[0]
    (other,) = warnings(ruled, patches(c011=40, c101=41, c110=19), None)
    assert "background (81.0%)" in other and "threshold" not in other


def test_two_classes_nearly_always_together(described):
    dataset = described("road", "roof", "lawn")
    (found,) = warnings(dataset, patches(c110=37, c100=2, c010=2, c001=30), None)
    assert "together: road and roof (both in 37 of the 41 patches that have either)" in found and "Merge" in found
    assert warnings(dataset, patches(c110=36, c100=2, c010=2, c001=30), None) == []  # exactly 90 %
    assert not any("together" in each for each in warnings(dataset, patches(c110=19, c001=40), None))  # both are rare
    assert not any("together" in each for each in warnings(dataset, patches(c110=90, c001=20), None))  # in 82 %


def test_a_class_in_too_few_patches(described):
    dataset = described("road", "roof", "lawn")
    (found,) = warnings(dataset, patches(c100=20, c010=30, c001=19), None)
    assert "in fewer than 20 train patches: lawn (19)." in found and "Label more patches" in found
    assert "lawn (0)" in warnings(dataset, patches(c100=25, c010=30), None)[0]
    assert warnings(dataset, patches(c100=20, c010=30, c001=20), None) == []


def test_classes_of_narrow_regions_and_of_no_meaning(described):
    labels = patches(c110=25, c011=25, c100=25, c001=25)
    (found,) = warnings(described("road", "roof", "lawn"), labels, np.array([[100, 50, 0], [49, 25, 0]]))
    assert "regions thinner than 16 px: road (51%)." in found and "finer resolution" in found
    for name in ("Unlabeled", "background", "no_data"):
        (found,) = warnings(described("road", "roof", name), labels, np.array([[991, 2000, 30], [991, 2000, 30]]))
        assert f"{name} covers 0.99% of the pixels" in found and "ignore_colours = [[2, 0, 0]]" in found
    assert warnings(described("road", "roof", "void"), labels, np.array([[990, 1980, 30]] * 2)) == []  # exactly 1 %


def reference_wide(ids: np.ndarray, classes: int, diameter: float) -> list[int]:
    """Pixels of each class inside some disc of this diameter that lies inside the class, by comparing all pairs.

    A disc has its centre in the image; what lies outside the image may be of any class.
    """
    y, x = np.mgrid[: ids.shape[0], : ids.shape[1]].reshape(2, -1)
    flat, wide = ids.ravel(), np.zeros(ids.size, bool)
    for k in np.unique(ids):
        own, others = np.flatnonzero(flat == k), np.flatnonzero(flat != k)
        for p in own:
            near = (y[others] - y[p]) ** 2 + (x[others] - x[p]) ** 2
            if not len(others) or near.min() >= (diameter / 2) ** 2:
                wide |= (flat == k) & ((y - y[p]) ** 2 + (x - x[p]) ** 2 < (diameter / 2) ** 2)
    return [int((wide & (flat == k)).sum()) for k in range(classes)]


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
    found, block = wide_pixels(ids, 3), 40 * 20
    assert 0.9 * block < found[1] < block + 4 * 8 and found[2] == 0
    ids[:] = np.indices((60, 60)).sum(0) // 5 % 2  # diagonal stripes of 3.5 px
    assert wide_pixels(ids, 2).tolist() == [0, 0]
    ids[:] = 255  # ignored pixels are of no class
    ids[:, :20] = 1
    assert wide_pixels(ids, 2).tolist() == [0, 1200]


def test_width_agrees_with_all_discs():
    """Against the definition, on random regions with straight edges: to a tenth of each class's pixels."""
    random = np.random.default_rng(3)
    for _ in range(3):
        y, x = np.mgrid[:40, :40]
        centres = random.uniform(0, 40, (5, 2))
        nearest = ((y[..., None] - centres[:, 0]) ** 2 + (x[..., None] - centres[:, 1]) ** 2).argmin(-1)
        ids = (nearest % 3).astype(np.uint8)
        difference = np.abs(wide_pixels(ids, 3) - reference_wide(ids, 3, 16))
        assert (difference <= 0.1 * np.bincount(ids.ravel())).all()


def test_warnings_are_printed_for_the_train_split(tmp_path, run_script):
    small(tmp_path)
    run = run_script(SCRIPT, "--dataset", "small", "--root", tmp_path)
    assert run.stdout.count("warning: ") == 2 + ("warning: most" in run.stdout)
    assert run.stdout.index("warning: in fewer than 20 train patches: road (") < run.stdout.index("test: ")
