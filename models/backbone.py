"""ImageNet backbones from torchvision, cut into three stages, output stride 16 (method sections 1 and 5)."""

from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision import models

BackboneName = Literal["resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2"]
NAMES: tuple[str, ...] = get_args(BackboneName)


class Backbone(nn.Module):
    """x (B,3,H,W) -> low (B,C1,H/4,W/4), mid (B,C2,H/8,W/8), high (B,C3,H/16,W/16).

    For a ResNet, low is the output of layer1, mid of layer2 and high of layer4. The stride of layer4 is 1, without
    dilation. MobileNetV2 is cut at the same strides. `low_channels` and `high_channels` are C1 and C3.

    name: one of `NAMES`. weights: "imagenet" (downloaded by torchvision), "none" (random), or the file of a torchvision
    state dict. Raises `ValueError` for an unknown name and for a file that does not fit.
    """

    def __init__(self, name: str = "resnet50", weights: str = "imagenet"):
        super().__init__()
        if name not in NAMES:
            raise ValueError(f"backbone is {name}, but it must be one of {', '.join(NAMES)}")
        whole = models.get_model(name, weights="IMAGENET1K_V1" if weights == "imagenet" else None)
        if weights not in ("imagenet", "none"):
            _load_file(whole, Path(weights), name)
        if name == "mobilenet_v2":
            stages = whole.features[:4], whole.features[4:7], whole.features[7:]
            whole.features[14].conv[1][0].stride = (1, 1)  # otherwise the output stride would be 32
            self.low_channels, self.high_channels = 24, 1280
        else:
            stem = (whole.conv1, whole.bn1, whole.relu, whole.maxpool)
            stages = nn.Sequential(*stem, whole.layer1), whole.layer2, nn.Sequential(whole.layer3, whole.layer4)
            first = whole.layer4[0]
            (first.conv2 if hasattr(first, "conv3") else first.conv1).stride = (1, 1)
            first.downsample[0].stride = (1, 1)
            wide = hasattr(first, "conv3")
            self.low_channels, self.high_channels = (256, 2048) if wide else (64, 512)
        self.low, self.mid, self.high = stages

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low = self.low(x)
        mid = self.mid(low)
        return low, mid, self.high(mid)


def fold_batchnorm(model: nn.Module) -> None:
    """Fold each BatchNorm into the convolution before it, in place; results stay equal within rounding.

    For inference: `model` must be in evaluation mode. In torchvision's networks a BatchNorm is registered directly
    after its convolution, in a Sequential as well as in a block, and is called directly after it.
    """
    for parent in list(model.modules()):
        for (name, convolution), (norm_name, norm) in pairwise(list(parent.named_children())):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(convolution, norm))
                setattr(parent, norm_name, nn.Identity())


def _load_file(model: nn.Module, path: Path, name: str) -> None:
    """Load a torchvision state dict; the weights of its classification head are optional."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"the weights file {path} is missing: correct the path") from None
    except Exception as error:  # torch has no common class for damaged files and for pickled code
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"the weights file {path} cannot be read as a plain state dict ({reason}): copy the file again, or save "
            "model.state_dict() with torch.save"
        ) from None
    try:
        state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
        missing, unexpected = model.load_state_dict(state, strict=False)
    except (RuntimeError, AttributeError):
        raise ValueError(
            f"the weights file {path} does not fit {name}: use a torchvision state dict of {name}"
        ) from None
    missing = [key for key in missing if not key.startswith(("fc.", "classifier.")) and "num_batches" not in key]
    if missing or unexpected:
        raise ValueError(
            f"the weights file {path} does not fit {name} ({len(missing)} values are missing, {len(unexpected)} are "
            f"unknown): use a torchvision state dict of {name}"
        )
