"""A trained segmenter, ready to predict: for the patches of step 6 and for whole scenes."""

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from models.backbone import Backbone
from models.deeplab import DeepLabV3Plus
from tools.cams import OUTPUT_STRIDE, for_inference, mirrored_scales
from tools.command import check
from tools.dataset import Dataset
from tools.memory import Parts
from tools.runs import Run
from tools.training import load_checkpoint


class Segmenter:
    """The model of a step 5 folder on the device of `accelerator`; `run` is the folder's run.json."""

    def __init__(self, folder: Path, run: Run, dataset: Dataset, accelerator: Accelerator):
        trained = run.constants
        check(
            trained["dataset"] == dataset.name,
            f"{folder} was trained on the data set {trained['dataset']}: use --dataset {trained['dataset']}, or train "
            f"on {dataset.name}",
        )
        backbone = Backbone(trained["backbone"], "none")
        model = DeepLabV3Plus(backbone, dataset.num_classes, trained["width"], freeze_norm=True)
        load_checkpoint(folder / "model.pt", model)
        self.accelerator, self.parts = accelerator, Parts()
        self.model = for_inference(model, accelerator.device)

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Images at each scale, (B,3,h,w) uint8 -> logits (B,K,H,W), H,W = size.

        Summed over all scales and mirror images (method section 6); in halves of the batch where the memory is full.
        """

        def predict(some: list[Tensor]) -> list[Tensor]:
            with self.accelerator.autocast():
                logits = mirrored_scales(self.model, some, self.accelerator.device)
                total = torch.zeros((), device=self.accelerator.device)
                for scale in logits:
                    total = total + F.interpolate(scale, tuple(size), mode="bilinear", align_corners=False)
                return [total]

        return self.parts.predict(predict, images)[0]


def small_probabilities(logits: Tensor, predictions: int) -> Tensor:
    """Logits (B,K,H,W), a sum over `predictions` passes -> class probabilities (B,K,h,w), means over 4 x 4 pixels.

    They come from the mean logits. As `tools.cams.fuse_scales` expects, they cover the image up to a multiple of the
    output stride; the border pixels are repeated there.
    """
    height, width = logits.shape[-2:]
    rest = (0, -width % OUTPUT_STRIDE, 0, -height % OUTPUT_STRIDE)
    probabilities = F.pad((logits / predictions).softmax(1), rest, mode="replicate")
    return F.avg_pool2d(probabilities, 4)
