"""DeepLabv3+ enlarges twice, with align_corners=True (method section 5): against an independent resampling."""

import numpy as np
import pytest
import torch

from models.backbone import Backbone
from models.deeplab import DeepLabV3Plus
from tests.references import bilinear, largest_error


@pytest.mark.parametrize("size", [(64, 96), (50, 33)])
def test_both_enlargements_align_the_corners(size):
    torch.manual_seed(0)
    model, seen = DeepLabV3Plus(Backbone("resnet18", "none"), 3, width=16).eval(), {}
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
