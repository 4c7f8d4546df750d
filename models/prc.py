"""Pixel relationship constraint (PRC): class maps spread over pixels whose features agree (method section 1)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PixelRelationshipConstraint(nn.Module):
    """M = C A: every pixel's class evidence becomes the mean of the evidence of pixels that look alike.

    The affinity A (N,N), N = h*w, is the cosine similarity of projected features [image ; features], clamped to
    [0.01, 0.999], cut below `gamma` and normalised so that each column sums to one. Gradients flow through A. The
    affinity is computed in float32 whatever the precision around it, because its threshold must not depend on rounding
    to bf16.

    feature_channels: D of the backbone's last stage; gamma: 0 to 0.999, affinities below it become 0 (above 0.999 even
    the diagonal would vanish: ValueError); iterations: how often A is applied, 0 switches PRC off.
    """

    def __init__(self, feature_channels: int, gamma: float = 0.7, iterations: int = 1):
        super().__init__()
        if not 0 <= gamma <= 0.999:
            raise ValueError(f"gamma is {gamma}, but it must lie between 0 and 0.999")
        if iterations < 0:
            raise ValueError(f"iterations is {iterations}, but it cannot be negative")
        self.gamma, self.iterations = gamma, iterations
        self.projection = nn.Conv2d(3 + feature_channels, feature_channels, 1, bias=False)
        self.projection.requires_grad_(iterations > 0)

    def affinity(self, features: Tensor, image: Tensor) -> Tensor:
        """features (B,D,h,w), image (B,3,H,W) normalised RGB -> A (B,N,N), columns sum to one."""
        precision = torch.promote_types(features.dtype, torch.float32)
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(precision)
            small = F.interpolate(image.to(precision), features.shape[-2:], mode="bilinear", align_corners=True)
            pixels = torch.cat([small, features], 1).flatten(2).transpose(1, 2)  # (B,N,3+D)
            # the 1x1 convolution as the matrix product it is: faster, and no GPU takes it for one that TF32 may round
            g = F.normalize(F.linear(pixels, self.projection.weight.flatten(1)), dim=2)
            similarity = (g @ g.transpose(1, 2)).clamp(0.01, 0.999)
            kept = similarity * (similarity >= self.gamma)
            # only a pixel without any feature (exact zeros) has an empty column; it keeps no evidence instead of NaN
            return kept / kept.sum(1, keepdim=True).clamp_min(1e-12)

    def forward(self, cam: Tensor, features: Tensor, image: Tensor) -> Tensor:
        """cam (B,K,h,w), features (B,D,h,w), image (B,3,H,W) -> (B,K,h,w) in float32 or better."""
        maps = cam.to(torch.promote_types(cam.dtype, torch.float32))
        if self.iterations == 0:
            return maps
        with torch.autocast(cam.device.type, enabled=False):
            affinity = self.affinity(features, image)
            maps = maps.flatten(2)
            for _ in range(self.iterations):
                maps = maps @ affinity
            return maps.view_as(cam)
