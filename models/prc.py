"""Pixel relationship constraint (PRC): class maps spread over similar pixels (method section 1)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PixelRelationshipConstraint(nn.Module):
    """M = C A: the class maps of a pixel become the weighted mean of those of similar pixels.

    The affinity A (N,N), N = h*w, is the cosine similarity of the projected features [image ;
    features], clamped to [0.01, 0.999]. Values below `gamma` become 0, then each column is divided
    by its sum. Gradients flow through A. The affinity is computed in float32 even under
    bf16 autocast, because the cut at gamma must not depend on rounding.

    feature_channels: D, channels of the backbone's last stage. gamma: 0 to 0.999; above 0.999 even
    the diagonal would become 0. iterations: how often A is applied; 0 switches PRC off. Raises
    `ValueError` for other values.
    """

    def __init__(self, feature_channels: int, gamma: float, iterations: int):
        super().__init__()
        if not 0 <= gamma <= 0.999:
            raise ValueError(f"gamma is {gamma}, but it must be from 0 to 0.999")
        if iterations < 0:
            raise ValueError(f"iterations is {iterations}, but it must be 0 or more")
        self.gamma, self.iterations = gamma, iterations
        self.projection = nn.Conv2d(3 + feature_channels, feature_channels, 1, bias=False)
        self.projection.requires_grad_(iterations > 0)

    def project(self, features: Tensor, image: Tensor) -> Tensor:
        """features (B,D,h,w), image (B,3,H,W) normalised RGB -> unit vectors (B,N,D), float32."""
        precision = torch.promote_types(features.dtype, torch.float32)
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(precision)
            size = features.shape[-2:]
            small = F.interpolate(image.to(precision), size, mode="bilinear", align_corners=True)
            pixels = torch.cat([small, features], 1).flatten(2).transpose(1, 2)  # (B,N,3+D)
            # The 1x1 convolution as a matrix product: faster, and not rounded to TF32.
            return F.normalize(F.linear(pixels, self.projection.weight.flatten(1)), dim=2)

    def affinity(self, features: Tensor, image: Tensor) -> Tensor:
        """features (B,D,h,w), image (B,3,H,W) normalised RGB -> A (B,N,N), columns sum to one."""
        g = self.project(features, image)
        with torch.autocast(features.device.type, enabled=False):
            similarity = (g @ g.transpose(1, 2)).clamp(0.01, 0.999)
            similarity = similarity * (similarity >= self.gamma)
            # Features that are all 0 give similarity 0.01, which gamma cuts: an empty column, and maps of 0, not NaN
            return similarity / similarity.sum(1, keepdim=True).clamp_min(1e-12)

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
