"""Images and labels are resized by Pillow, bicubic and nearest, as in the released code: equal to the last bit."""

import numpy as np
import torch
from PIL import Image

from inference_segmentation import summed_logits
from tools.augment import MEAN, STD, TrainingPatches
from tools.command import stop
from tools.inference import image_batches
from tools.labels import IGNORE, save_label


def bytes_of(normalised: np.ndarray) -> np.ndarray:
    """(3,h,w) float32 as a network gets it -> the (h,w,3) uint8 that it was."""
    pixels = (normalised.transpose(1, 2, 0) * STD + MEAN) * 255
    assert np.abs(pixels - pixels.round()).max() < 1e-3
    return pixels.round().astype(np.uint8)


def test_training_patches(tmp_path):
    """Patches that were shrunk lie whole in their crop: image and label are those of Pillow, or their mirrors."""
    rng, sizes = np.random.default_rng(0), set()
    image = rng.integers(0, 256, (37, 50, 3)).astype(np.uint8)
    label = np.where(rng.random((37, 50)) < 0.5, 0, 9).astype(np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(image).save(tmp_path / "images" / "a.png")
    save_label(tmp_path / "labels" / "a.png", label, np.zeros((10, 3), np.uint8))
    patches = TrainingPatches(["a"], tmp_path / "images", tmp_path / "labels", 10, 64, seed=0)
    for epoch in range(40):
        found, ids = (tensor.numpy() for tensor in patches[epoch, 0])
        rows, columns = (np.flatnonzero((ids != IGNORE).any(axis)) for axis in (1, 0))
        height, width = len(rows), len(columns)
        if width == 64:  # as wide as the crop: perhaps cut
            continue
        sizes.add((height, width))
        window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        small = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
        small_ids = np.asarray(Image.fromarray(label).resize((width, height), Image.Resampling.NEAREST))
        pairs = [(small, small_ids), (small[:, ::-1], small_ids[:, ::-1])]
        found = bytes_of(found[:, *window])
        assert any(np.array_equal(found, a) and np.array_equal(ids[window], b) for a, b in pairs), (height, width)
    assert len(sizes) > 10 and any(width % 2 for _, width in sizes)


def test_scales_of_inference(tmp_path):
    """Steps 2 and 6 see each image at each scale as Pillow makes it; sides are rounded, half up to even."""
    rng = np.random.default_rng(1)
    images = {id: rng.integers(0, 256, (37, 50, 3)).astype(np.uint8) for id in "ab"}
    for id, image in images.items():
        Image.fromarray(image).save(tmp_path / f"{id}.png")
    scales, sizes = (0.5, 1.0, 1.5, 2.0), ((18, 25), (37, 50), (56, 75), (74, 100))
    ((ids, size, found),) = image_batches(tmp_path, ["a", "b"], scales, 2, 0, stop)
    assert ids == ["a", "b"] and size == (37, 50)
    seen = []
    summed_logits(lambda x: seen.append(x) or x[:, :1], found, size, torch.device("cpu"))
    for (height, width), batch in zip(sizes, seen, strict=True):
        expected = [
            np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
            for image in images.values()
        ]
        expected += [pixels[:, ::-1] for pixels in expected]  # both images, then both mirror images
        np.testing.assert_array_equal([bytes_of(pixels) for pixels in batch.numpy()], expected)
