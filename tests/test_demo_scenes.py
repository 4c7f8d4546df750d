"""The demo's synthetic scenes: reproducible, readable as Vaihingen's, and hard enough to be worth a method."""

import json

import numpy as np
import pytest
from PIL import Image

from datasetsprocess.make_demo_scenes import Constants, main, make_scene
from tests.conftest import ROOT
from tools.command import UserError
from tools.dataset import load_dataset
from tools.labels import ColourDecoder

FOLDERS = ("top", "gts_for_participants")


@pytest.fixture(scope="module")
def default_scenes(tmp_path_factory):
    """Area -> (image, class ids) of all scenes at their default settings, decoded from the files."""
    root = tmp_path_factory.mktemp("demo")
    main(Constants(root=root, workers=2))
    dataset = load_dataset("demo", root)
    decode = ColourDecoder(dataset.colours, dataset.ignore_colours)
    scenes, unknown = {}, {}
    for area in dataset.scenes["train"] + dataset.scenes["test"]:
        files = [root / f"datasets/demo/raw/{folder}/top_mosaic_09cm_area{area}.tif" for folder in FOLDERS]
        image, truth = (np.array(Image.open(file)) for file in files)
        assert image.shape == truth.shape == (1024, 1024, 3) and image.dtype == truth.dtype == np.uint8
        scenes[area] = image, decode(truth, unknown)
    assert not unknown
    return dataset, scenes


def describe(root, areas=("1", "2"), name="few"):
    folder = root / "datasets" / name
    folder.mkdir(parents=True)
    (folder / "dataset.toml").write_text(f'base = "demo"\n[scenes]\ntrain = {json.dumps(areas)}\ntest = []\n')
    return folder


def test_every_class_has_pixels_and_every_image_is_exposed_well(default_scenes):
    dataset, scenes = default_scenes
    for split in ("train", "test"):
        counts = sum(np.bincount(scenes[area][1].ravel(), minlength=256) for area in dataset.scenes[split])
        assert counts[:6].min() > 5000 and counts[6:].sum() == 0
    for area, (image, _) in scenes.items():
        assert 60 < image.mean() < 150 and image.std(axis=(0, 1)).min() > 15, area
        assert np.isin(image, (0, 255)).mean() < 0.02, area


def test_image_level_labels_carry_information(default_scenes):
    dataset, scenes = default_scenes
    tiles = [
        scenes[area][1][row : row + 128, column : column + 128]
        for area in dataset.scenes["train"]
        for row in range(0, 1024, 128)
        for column in range(0, 1024, 128)
    ]
    labels = np.array([np.isin(np.arange(6), tile) for tile in tiles])
    shares = dict(zip(dataset.classes, labels.mean(0), strict=True))
    assert all(0.08 <= share <= 0.85 for share in shares.values()), shares
    assert 0.3 < (labels.sum(1) <= 3).mean() < 0.8  # some tiles with few classes, some with many
    assert len(np.unique(labels, axis=0)) >= 20
    together = labels.T.astype(float) @ labels / labels.sum(0)  # [i, j]: how often class i is there where j is
    together[0, 4] = 0  # cars stand on streets, as they do in Vaihingen
    assert (together[~np.eye(6, dtype=bool)] < 0.99).all()


def test_colour_alone_does_not_solve_the_scenes(default_scenes):
    dataset, scenes = default_scenes

    def flat(split: str) -> tuple[np.ndarray, np.ndarray]:
        image, ids = (np.stack(parts) for parts in zip(*(scenes[area] for area in dataset.scenes[split]), strict=True))
        cells = image.reshape(-1, 3).astype(int) // 8 @ [32 * 32, 32, 1]
        return cells, ids.ravel()

    cells, ids = flat("train")
    most_frequent = np.bincount(cells * 6 + ids, minlength=32**3 * 6).reshape(-1, 6).argmax(1)
    cells, ids = flat("test")
    scored = ids != 5
    confusion = np.bincount(ids[scored] * 6 + most_frequent[cells[scored]], minlength=36).reshape(6, 6)
    iou = (np.diag(confusion) / (confusion.sum(0) + confusion.sum(1) - np.diag(confusion)))[:5]
    assert 0.30 < iou.mean() < 0.60, iou


def test_seed_decides_every_byte(tmp_path):
    def files(name: str, seed: int) -> dict[str, bytes]:
        folder = describe(tmp_path / name)
        main(Constants(dataset="few", root=tmp_path / name, seed=seed, size=192, workers=0))
        return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.tif"))}

    first, again, other = files("a", 0), files("b", 0), files("c", 1)
    assert list(first) == [f"raw/{folder}/top_mosaic_09cm_area{n}.tif" for folder in sorted(FOLDERS) for n in (1, 2)]
    assert first == again
    assert all(first[name] != other[name] for name in first)
    assert len(set(first.values())) == len(first)  # areas differ too


@pytest.mark.parametrize("size", [16, 64, 129, 300])
def test_any_size_and_seed(size):
    for seed in range(10):
        image, ids = make_scene(np.random.default_rng(seed), size)
        assert image.shape == (size, size, 3) and ids.shape == (size, size) and ids.max() <= 5


def test_continues_and_refuses_other_settings(tmp_path, run_script):
    raw = describe(tmp_path) / "raw"
    words = ("--dataset", "few", "--root", tmp_path, "--size", 128, "--workers", 0)
    run_script("make_demo_scenes.py", *words, cwd=ROOT / "datasetsprocess")
    images = [raw / name / "top_mosaic_09cm_area1.tif" for name in FOLDERS]
    before = [image.read_bytes() for image in images]
    images[0].unlink()
    finished = raw / "top" / "top_mosaic_09cm_area2.tif"
    painted = finished.stat().st_mtime_ns
    run_script("datasetsprocess/make_demo_scenes.py", *words)
    assert finished.stat().st_mtime_ns == painted  # a finished scene is not painted again
    assert [image.read_bytes() for image in images] == before
    record = json.loads((raw / "run.json").read_text())
    assert record["finished"] and record["files"] == 4
    constants = {"dataset": "few", "root": tmp_path, "size": 128, "workers": 0, "seed": 1}
    with pytest.raises(UserError, match="--overwrite"):
        main(Constants(**constants))
    main(Constants(**constants, overwrite=True))
    assert images[0].read_bytes() != before[0]


@pytest.mark.parametrize(
    ("constants", "words"),
    [
        ({"size": 100}, "size is 100"),
        ({"seed": -1}, "seed is -1"),
        ({"dataset": "isaid"}, "16 classes"),
        ({"dataset": "none"}, "lists no scenes"),
    ],
)
def test_bad_constants_are_named(tmp_path, constants, words):
    describe(tmp_path, (), "none")
    with pytest.raises(UserError, match=words):
        main(Constants(root=tmp_path, **constants))
    assert not list(tmp_path.rglob("*.tif"))
