"""DeepLabv3+ with channel and spatial attention on its low-level features (method section 5)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbone import Backbone


def conv_norm(inputs: int, outputs: int, kernel: int = 1, dilation: int = 1) -> nn.Sequential:
    """Convolution that keeps the size, GroupNorm(4), ReLU: (B,inputs,h,w) -> (B,outputs,h,w)."""
    padding = dilation * (kernel // 2)
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(4, outputs), nn.ReLU(inplace=True))


class AtrousSpatialPyramidPooling(nn.Module):
    """ASPP (Chen et al., 2018): rates 1, 6, 12, 18 and the image mean; (B,C,h,w) -> (B,width,h,w)."""

    def __init__(self, inputs: int, width: int, rates: tuple[int, ...] = (6, 12, 18), dropout: float = 0.5):
        super().__init__()
        self.branches = nn.ModuleList(
            [conv_norm(inputs, width), *(conv_norm(inputs, width, 3, rate) for rate in rates)]
        )
        self.pooling = conv_norm(inputs, width)
        self.fuse = nn.Sequential(conv_norm((len(rates) + 2) * width, width), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        image = self.pooling(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[-2:])
        return self.fuse(torch.cat([*(branch(x) for branch in self.branches), image], 1))


class ChannelAttention(nn.Module):
    """CBAM (Woo et al., 2018): weights channels by mean and maximum through one shared bottleneck.

    The shape stays (B,C,h,w).
    """

    def __init__(self, channels: int, bottleneck: int = 3):
        super().__init__()
        self.shared = nn.Sequential(
            nn.Conv2d(channels, bottleneck, 1, bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(bottleneck, channels, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        mean, maximum = x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        return x * torch.sigmoid(self.shared(mean) + self.shared(maximum))


class SpatialAttention(nn.Module):
    """CBAM: weights pixels by a 7 x 7 convolution of their mean and maximum; stays (B,C,h,w)."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.convolution(pooled))


class DeepLabV3Plus(nn.Module):
    """x (B,3,H,W) normalised RGB -> logits (B,K,H,W).

    Output stride 16 without dilation in the backbone; the new norms are GroupNorm(4). The new
    convolutions start from Kaiming-normal weights, except those of the attentions, which start from
    torch's default. width: channels of ASPP and decoder, a multiple of 4. freeze_norm: the
    backbone's BatchNorm keeps its running statistics; its scale and bias learn.
    """

    def __init__(self, backbone: Backbone, num_classes: int, width: int, freeze_norm: bool):
        super().__init__()
        self.backbone, self.freeze_norm = backbone, freeze_norm
        self.aspp = AtrousSpatialPyramidPooling(backbone.high_channels, width)
        reduction = conv_norm(backbone.low_channels, 48)
        self.low = nn.Sequential(reduction, ChannelAttention(48), SpatialAttention())
        self.decoder = nn.Sequential(
            conv_norm(width + 48, width, 3),
            nn.Dropout(0.5),
            conv_norm(width, width, 3),
            nn.Dropout(0.1),
            nn.Conv2d(width, num_classes, 1),
        )
        for module in (*self.aspp.modules(), *self.low[0].modules(), *self.decoder.modules()):
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def train(self, mode: bool = True) -> "DeepLabV3Plus":
        """Switch to training; a frozen BatchNorm keeps using its running statistics."""
        super().train(mode)
        if self.freeze_norm:
            for module in self.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):  # SyncBatchNorm as well
                    module.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        low, _, high = self.backbone(x)
        high = F.interpolate(self.aspp(high), low.shape[-2:], mode="bilinear", align_corners=True)
        logits = self.decoder(torch.cat([high, self.low(low)], 1))
        return F.interpolate(logits.float(), x.shape[-2:], mode="bilinear", align_corners=True)
