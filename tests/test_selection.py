"""The released protocol's choice of the epoch, a second time in NumPy: maps, classes, sizes, dropped images, mean."""

import math
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tools.dataset import load_dataset
from tools.image_labels import write_image_labels
from tools.labels import resize_label, save_label
from tools.selection import cam_miou, segmentation_miou

MEAN, STD = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
DESCRIPTION = """
patch_size = 16
classes = [
  {name = "a", colour = [1, 1, 1]},
  {name = "b", colour = [2, 2, 2]},
  {name = "c", colour = [3, 3, 3]},
  {name = "never", colour = [4, 4, 4]},
]
"""


class Pixels(nn.Module):
    """Maps of each 4 x 4 pixels, or of each pixel: the colours, which become negative, and their difference."""

    def __init__(self, cell):
        super().__init__()
        self.pool = nn.AvgPool2d(cell)

    def forward(self, x):
        assert not self.training
        maps = self.pool(x)
        maps = torch.cat([maps, maps[:, :1] - 5], 1)  # the fourth class is never the highest
        return (None, maps) if self.pool.kernel_size > 1 else maps


def colours(image, cell):
    """What `Pixels` gives for an image (H,W,3), in float64: (4,h,w)."""
    x = (image / 255 - MEAN) / STD
    h, w = image.shape[0] // cell, image.shape[1] // cell
    x = x[: h * cell, : w * cell].reshape(h, cell, w, cell, 3).mean((1, 3)).transpose(2, 0, 1)
    return np.concatenate([x, x[:1] - 5])


@pytest.fixture
def made(tmp_path):
    """A step on 8 train patches of 20 x 24 pixels, in batches of 3: the last two patches are dropped."""
    random, folder = np.random.default_rng(0), tmp_path / "datasets" / "fields"
    labels = {}
    (folder / "train" / "images").mkdir(parents=True)
    (folder / "dataset.toml").write_text(DESCRIPTION)
    for index, id in enumerate("abcdefgh"):
        image = random.integers(0, 256, (5, 6, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
        truth = random.integers(0, 3, (20, 24)).astype(np.uint8)
        truth[random.random(truth.shape) < 0.1] = 255
        Image.fromarray(image).save(folder / "train" / "images" / f"{id}.png")
        save_label(folder / "train" / "labels" / f"{id}.png", truth, np.arange(12, dtype=np.uint8).reshape(4, 3))
        labels[id] = np.array([index % 2 == 0, True, index % 3 == 0, False])
    dataset = load_dataset("fields", tmp_path)
    write_image_labels(dataset.image_labels_file("train"), dataset.classes, labels)
    step = SimpleNamespace(
        dataset=dataset,
        ids=dataset.ids("train"),
        image_labels=dataset.image_labels("train"),
        device=torch.device("cpu"),
        args=SimpleNamespace(batch_size=3, workers=0),
    )
    return step, labels


def read(dataset, id):
    images, truths = dataset.images("train"), dataset.labels("train")
    return tuple(np.asarray(Image.open(folder / f"{id}.png")) for folder in (images, truths))


def mean_iou(pairs):
    """Of all four classes: one that is in neither truth nor prediction counts as 0."""
    truth, prediction = (np.concatenate([array.ravel() for array in arrays]) for arrays in zip(*pairs, strict=True))
    counted = truth != 255
    ious = []
    for k in range(4):
        union = ((truth == k) | (prediction == k)) & counted
        ious.append(((truth == k) & (prediction == k)).sum() / union.sum() if union.any() else 0)
    return np.mean(ious)


def test_step_1(made):
    step, labels = made
    pairs = []
    for id in "abcdef":
        image, truth = read(step.dataset, id)
        maps = np.maximum(colours(image, 4), 0)
        maps = np.maximum(maps - 1e-5, 0) / (maps.max((1, 2), keepdims=True) + 1e-5)
        maps[~labels[id]] = 0
        # of each cell of 4 x 4 pixels the upper left one, as by OpenCV's INTER_NEAREST
        pairs.append((truth[::4, ::4], maps.argmax(0)))
    expected = mean_iou(pairs)
    assert cam_miou(Pixels(4).train(), step) == pytest.approx(expected, abs=1e-9)
    assert 0.1 < expected < 0.6
    assert {int(k) for _, prediction in pairs for k in np.unique(prediction)} == {0, 1, 2}


def test_cells_of_any_size_take_their_upper_left_pixel():
    """floor(i x scale), written out; OpenCV agrees."""
    truth = np.arange(7 * 10, dtype=np.uint8).reshape(7, 10)
    expected = [[truth[math.floor(i * 7 / 3), math.floor(j * 10 / 4)] for j in range(4)] for i in range(3)]
    assert resize_label(truth, (3, 4)).tolist() == expected
    assert cv2.resize(truth, (4, 3), interpolation=cv2.INTER_NEAREST).tolist() == expected


def test_a_cell_without_a_map_becomes_class_0(made):
    """Also where the image-level label is without class 0: here every map of every cell is negative."""
    step, _ = made

    class Nothing(nn.Module):
        def forward(self, x):
            return None, -torch.ones(len(x), 4, 5, 6)

    pairs = [(read(step.dataset, id)[1][::4, ::4], np.zeros((5, 6), int)) for id in "abcdef"]
    assert cam_miou(Nothing(), step) == pytest.approx(mean_iou(pairs), abs=1e-9) and mean_iou(pairs) > 0


def test_step_5(made):
    step, _ = made
    pairs = []
    for id in "abcdef":
        image, truth = read(step.dataset, id)
        pairs.append((truth[:16, :16], colours(image[:16, :16], 1).argmax(0)))
    expected = mean_iou(pairs)
    assert segmentation_miou(Pixels(1).train(), step) == pytest.approx(expected, abs=1e-9)
    assert 0.1 < expected < 0.6


@pytest.mark.parametrize(("measure", "cell"), [(cam_miou, 4), (segmentation_miou, 1)])
def test_no_gradient_is_kept_and_what_is_dropped_does_not_count(made, measure, cell):
    step, _ = made
    before = measure(Pixels(cell), step)
    for id in "gh":
        (step.dataset.labels("train") / f"{id}.png").unlink()
    assert measure(Pixels(cell), step) == before
    step.args.batch_size = 4  # now the last two count, and their labels are read
    with pytest.raises(Exception, match=r"g\.png is missing"):
        measure(Pixels(cell), step)
