"""Images are resized by Pillow, to the last bit; maps as an independent resampling in float64 does it."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from inference_segmentation import summed_logits
from models.backbone import Backbone
from models.deeplab import DeepLabV3Plus
from tests.references import bilinear, largest_error
from tools.augment import MEAN, STD, normalise
from tools.command import stop
from tools.inference import image_batches


@pytest.mark.parametrize("size", [(64, 96), (50, 33)])
def test_deeplab_aligns_the_corners_twice(size):
    torch.manual_seed(0)
    model, seen = DeepLabV3Plus(Backbone("resnet18", "none"), 3, width=16, freeze_norm=True).eval(), {}
    model.aspp.register_forward_hook(lambda module, inputs, output: seen.update(high=output))
    model.low.register_forward_hook(lambda module, inputs, output: seen.update(low=output))
    model.decoder.register_forward_pre_hook(lambda module, inputs: seen.update(joined=inputs[0]))
    model.decoder.register_forward_hook(lambda module, inputs, output: seen.update(logits=output))
    with torch.inference_mode():
        seen["result"] = model(torch.randn(2, 3, *size))
    seen = {name: value.double().numpy() for name, value in seen.items()}

    expected = bilinear(seen["high"], seen["low"].shape[2:], align_corners=True)
    assert largest_error(seen["joined"], np.concatenate([expected, seen["low"]], 1)) < 1e-5
    assert largest_error(seen["result"], bilinear(seen["logits"], size, align_corners=True)) < 1e-5


def test_step_6_sums_the_logits_of_all_scales_at_image_size():
    """A stand-in for the network says of each pixel its colour."""
    random = torch.Generator().manual_seed(0)
    sizes = (18, 25), (37, 50), (56, 75), (74, 100)
    images = [torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=random) for size in sizes]
    both = [2 * normalise(image).double().numpy() for image in images]  # an image and its mirror image
    expected = sum(bilinear(maps, (37, 50), align_corners=False) for maps in both)
    (logits,) = summed_logits(nn.Identity(), images, (37, 50), torch.device("cpu"))
    assert largest_error(logits.numpy(), expected) < 1e-5


def bytes_of(normalised: np.ndarray) -> np.ndarray:
    """(3,h,w) float32 as a network gets it -> the (h,w,3) uint8 that it was."""
    pixels = (normalised.transpose(1, 2, 0) * STD + MEAN) * 255
    assert np.abs(pixels - pixels.round()).max() < 1e-3
    return pixels.round().astype(np.uint8)


def test_scales_of_inference(tmp_path):
    """Steps 2 and 6 see each image at each scale as Pillow makes it; sides are rounded, half up to even."""
    rng = np.random.default_rng(1)
    images = {id: rng.integers(0, 256, (37, 50, 3)).astype(np.uint8) for id in "ab"}
    for id, image in images.items():
        Image.fromarray(image).save(tmp_path / f"{id}.png")
    scales, sizes = (0.5, 1.0, 1.5, 2.0), ((18, 25), (37, 50), (56, 75), (74, 100))
    ((ids, size, batches),) = image_batches(tmp_path, ["a", "b"], scales, 2, 0, stop)
    assert ids == ["a", "b"] and size == (37, 50)
    seen = []
    summed_logits(lambda x: seen.append(x) or x[:, :1], batches, size, torch.device("cpu"))
    for (height, width), batch in zip(sizes, seen, strict=True):
        expected = [
            np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
            for image in images.values()
        ]
        expected += [pixels[:, ::-1] for pixels in expected]  # both images, then both mirror images
        np.testing.assert_array_equal([bytes_of(pixels) for pixels in batch.numpy()], expected)
