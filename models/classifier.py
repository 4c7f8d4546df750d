"""The classifier whose class activation maps (CAMs) become pseudo-labels (method section 1)."""

from torch import Tensor, nn

from models.backbone import Backbone
from models.prc import PixelRelationshipConstraint


class Classifier(nn.Module):
    """Image-level classifier with PRC on its class activation maps.

    The logits are the spatial mean of the RAW maps, so only the image reconstruction loss trains
    PRC. The stages low and mid (ResNet: stem, layer1, layer2) do not learn, but their BatchNorm
    statistics move. With `train_all` they learn as well, for backbones that start from random
    weights. gamma, iterations: see `PixelRelationshipConstraint`.
    """

    def __init__(self, backbone: Backbone, num_classes: int, gamma: float, iterations: int, train_all: bool):
        super().__init__()
        self.backbone = backbone
        backbone.low.requires_grad_(train_all)
        backbone.mid.requires_grad_(train_all)
        self.classifier = nn.Conv2d(backbone.high_channels, num_classes, 1, bias=False)
        nn.init.kaiming_normal_(self.classifier.weight)
        self.prc = PixelRelationshipConstraint(backbone.high_channels, gamma, iterations)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B,3,H,W) normalised RGB -> logits (B,K), class maps after PRC (B,K,H/16,W/16)."""
        _, _, features = self.backbone(x)
        raw = self.classifier(features)
        return raw.mean((2, 3)), self.prc(raw, features, x)
