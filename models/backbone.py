"""Backbones of torchvision in three stages, output stride 16 (method sections 1 and 5)."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision import models

BackboneName = Literal["resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2"]
NAMES: tuple[str, ...] = get_args(BackboneName)
Weights = Literal["imagenet", "none"] | Mapping[str, Tensor]


class Backbone(nn.Module):
    """x (B,3,H,W) -> low (B,C1,H/4,W/4), mid (B,C2,H/8,W/8), high (B,C3,H/16,W/16).

    For a ResNet, low is the output of layer1, mid of layer2 and high of layer4. The stride of
    layer4 is 1, without dilation. MobileNetV2 is cut at the same strides. `low_channels` and
    `high_channels` are C1 and C3.

    name: one of `NAMES`. weights: "imagenet" (downloaded by torchvision), "none" (random), or the
    state dict of the network in torchvision, with or without the classification head. Raises
    `ValueError` for other names and weights.
    """

    def __init__(self, name: str, weights: Weights):
        super().__init__()
        if name not in NAMES:
            raise ValueError(f"backbone is {name}, but it must be one of {', '.join(NAMES)}")
        network = models.get_model(name, weights="IMAGENET1K_V1" if weights == "imagenet" else None)
        if weights not in ("imagenet", "none"):
            _load(network, weights, name)
        if name == "mobilenet_v2":
            stages = network.features[:4], network.features[4:7], network.features[7:]
            network.features[14].conv[1][0].stride = (1, 1)  # output stride 16, not 32
            self.low_channels, self.high_channels = 24, 1280
        else:
            stem = network.conv1, network.bn1, network.relu, network.maxpool
            low = nn.Sequential(*stem, network.layer1)
            stages = low, network.layer2, nn.Sequential(network.layer3, network.layer4)
            block = network.layer4[0]
            bottleneck = hasattr(block, "conv3")
            (block.conv2 if bottleneck else block.conv1).stride = (1, 1)
            block.downsample[0].stride = (1, 1)
            self.low_channels, self.high_channels = (256, 2048) if bottleneck else (64, 512)
        self.low, self.mid, self.high = stages

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low = self.low(x)
        mid = self.mid(low)
        return low, mid, self.high(mid)


def fold_batchnorm(model: nn.Module) -> None:
    """Fold each BatchNorm into the convolution before it, in place; equal within rounding.

    For inference: `model` must be in evaluation mode. In torchvision's networks a BatchNorm is
    registered directly after its convolution, in a Sequential as well as in a block, and is called
    directly after it.
    """
    for parent in list(model.modules()):
        for (name, convolution), (norm_name, norm) in pairwise(list(parent.named_children())):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(convolution, norm))
                setattr(parent, norm_name, nn.Identity())


def _load(network: nn.Module, weights: object, name: str) -> None:
    """Load a state dict of which the classification head and BatchNorm's counters may be missing."""
    remedy = f"use a torchvision state dict of {name}"
    if not isinstance(weights, Mapping) or not all(map(_is_plain, weights.values())):
        raise ValueError(f"the weights are not a dict of tensors, so they do not fit {name}: {remedy}")
    values = network.state_dict()
    optional = {key for key in values if key.startswith(("fc.", "classifier.")) or "num_batches" in key}
    missing = values.keys() - optional - weights.keys()
    unknown = weights.keys() - values.keys()
    common = weights.keys() & values.keys()
    reshaped = [key for key in common if weights[key].shape != values[key].shape]
    if missing or unknown or reshaped:
        raise ValueError(
            f"the weights do not fit {name} ({len(missing)} values are missing, "
            f"{len(unknown)} are unknown, {len(reshaped)} have another shape): {remedy}"
        )
    for key, value in weights.items():
        if not value.isfinite().all():
            raise ValueError(f"the weights hold values in {key} that are not finite: {remedy}")
    network.load_state_dict({**values, **weights})


def _is_plain(value: object) -> bool:
    """Whether a value is a dense tensor that holds its numbers."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
