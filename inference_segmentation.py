"""Step 6: label maps by the segmenter, four scales and their mirrors, no CRF (method section 6).

Reads  segmenter/ and datasets/<dataset>/<split>/images
Writes experiments/<dataset>/<experiment>/segmentation/<id>.png: class ids; with keep_probabilities also
       <id>.npz: class probabilities

    python inference_segmentation.py --dataset vaihingen

segment_scene.py segments whole large images.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbone import Backbone
from models.deeplab import DeepLabV3Plus
from report.page import renew
from tools.command import check, run
from tools.constants import Machine, MayChange, PositiveCount, Scales, checked_constants
from tools.inference import for_inference, image_batches, with_mirrors
from tools.labels import save_label
from tools.map_files import OUTPUT_STRIDE, save_maps
from tools.memory import Halving
from tools.step import Step
from tools.training import load_checkpoint
from tools.workers import in_background


@checked_constants
class Constants(Machine):  # and root, overwrite, workers, samples, device
    dataset: str = "vaihingen"  # vaihingen | potsdam | isaid | demo | the name of your own dataset.toml
    experiment: str = "prc"  # results go to experiments/<dataset>/<experiment>/
    split: Literal["train", "test"] = "test"  # test | train (to measure only; goes to segmentation_train)
    scales: Scales = (0.5, 1.0, 1.5, 2.0)  # each with its mirror image
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # as in step 5
    images_at_once: MayChange[PositiveCount] = 8  # patches of one batch; lower it when the GPU's memory is short
    keep_probabilities: MayChange[bool] = False  # also write <id>.npz: class probabilities, for rule mean_cam of step 7


@torch.no_grad()
def summed_logits(
    segmenter: nn.Module, scaled_images: Sequence[Tensor], size: Sequence[int], device: torch.device
) -> list[Tensor]:
    """Images at each scale (B,3,h,w) uint8 -> logits (B,K,H,W) float32, H,W = size, as the only one of a list.

    They are enlarged to the size and summed over all scales and mirror images (method section 6).
    """
    total = torch.zeros((), device=device)
    for images in scaled_images:
        plain, mirrored = segmenter(with_mirrors(images, device)).float().chunk(2)
        both = plain + mirrored.flip(-1)
        total = total + F.interpolate(both, tuple(size), mode="bilinear", align_corners=False)
    return [total]


def load_segmenter(step: Step) -> DeepLabV3Plus:
    """The segmenter that `step` reads, ready for inference."""
    trained, name = step.run_of["segmenter"].constants, step.dataset.name
    check(
        trained["dataset"] == name,
        f"{step.reads['segmenter']} was trained on the data set {trained['dataset']}: use --dataset "
        f"{trained['dataset']}, or train on {name}",
    )
    backbone = Backbone(trained["backbone"], "none")
    model = DeepLabV3Plus(backbone, step.dataset.num_classes, trained["width"], freeze_norm=True)
    load_checkpoint(step.reads["segmenter"] / "model.pt", model)
    return for_inference(model, step.device)


def small_probabilities(logits: Tensor, predictions: int) -> Tensor:
    """Logits (B,K,H,W), a sum over `predictions` passes -> class probabilities (B,K,h,w), means over 4 x 4 pixels.

    They come from the mean logits. As `tools.map_files.fuse_scales` expects, they cover the image up to a multiple of
    the output stride; the border pixels are repeated there.
    """
    height, width = logits.shape[-2:]
    border = (0, -width % OUTPUT_STRIDE, 0, -height % OUTPUT_STRIDE)
    probabilities = F.pad((logits / predictions).softmax(1), border, mode="replicate")
    return F.avg_pool2d(probabilities, 4)


def save_patch(folder: Path, id: str, label: np.ndarray, maps: np.ndarray | None, colours: np.ndarray) -> None:
    """Write the label map (H,W) of a patch and, where they are kept, its class probabilities (K,h,w)."""
    if maps is not None:
        save_maps(folder / f"{id}.npz", "probabilities", np.arange(len(maps)), [maps], label.shape)
    save_label(folder / f"{id}.png", np.ascontiguousarray(label), colours)


def main(args: Constants) -> None:
    step = Step("segmentation", args)
    dataset, model, halving = step.dataset, load_segmenter(step), Halving(args.images_at_once)
    with step.output(".png"):
        missing = set(step.pending(step.ids, ".png"))
        if args.keep_probabilities:
            missing |= set(step.pending(step.ids, ".npz"))
        pending = [id for id in step.ids if id in missing]
        batches = image_batches(
            dataset.images(step.split), pending, args.scales, args.images_at_once, args.workers, step.fail
        )
        with step.progress(len(pending), "segmentation") as bar, step.accelerator.autocast(), in_background() as submit:
            for ids, size, scaled_images in batches:
                predict = partial(summed_logits, model, size=size, device=step.device)
                (logits,) = halving.predict(predict, scaled_images)
                labels = logits.argmax(1).to(torch.uint8).cpu().numpy()
                if args.keep_probabilities:
                    probabilities = small_probabilities(logits, 2 * len(args.scales)).cpu().numpy()
                for index, id in enumerate(ids):
                    maps = probabilities[index] if args.keep_probabilities else None
                    submit(save_patch, step.path, id, labels[index], maps, dataset.colours)
                bar.update(len(ids))
        learnt_from = step.run_of["segmenter"].constants.get("labels", "truth")
        folder = None if learnt_from == "truth" else step.experiment / learnt_from
        remedy = "compare with the pseudo-labels of step 4, and train step 5 for longer"
        step.warn_of_labels(step.path, remedy, folder)
        step.draw_labels({"segmentation": step.path})


if __name__ == "__main__":
    run(main, Constants, __doc__, then=renew)
