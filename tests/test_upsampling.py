"""Where maps are enlarged on the way to a segmentation: against an independent resampling in float64."""

import numpy as np
import pytest
import torch
from torch import nn

from inference_segmentation import summed_logits
from models.backbone import Backbone
from models.deeplab import DeepLabV3Plus
from tests.references import bilinear, largest_error
from tools.augment import normalise


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
