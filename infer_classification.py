"""Step 2: class activation maps at four scales and their mirrors, with PRC (method section 2).

Reads  classifier/ and datasets/<dataset>/<split>/images with image_labels.csv
Writes experiments/<dataset>/<experiment>/cams/<id>.npz: the maps of the classes present, at feature size, in float16,
       and the mean logit of every class, for datasetsprocess/label_page.py --review

    python infer_classification.py --dataset vaihingen
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from models.backbone import Backbone
from models.classifier import Classifier
from report.page import renew
from tools.command import run
from tools.constants import Count, Machine, MayChange, PositiveCount, Scales, checked_constants
from tools.inference import for_inference, image_batches, with_mirrors
from tools.map_files import load_maps, save_maps
from tools.memory import Halving
from tools.step import Step
from tools.training import load_checkpoint
from tools.workers import in_background


@checked_constants
class Constants(Machine):  # and root, overwrite, workers, samples, device
    dataset: str = "vaihingen"  # vaihingen | potsdam | isaid | demo | the name of your own dataset.toml
    experiment: str = "prc"  # results go to experiments/<dataset>/<experiment>/
    split: Literal["train", "test"] = "train"  # train, for the pseudo-labels | test, to measure only: cams_test
    scales: Scales = (0.5, 1.0, 1.5, 2.0)  # each with its mirror image
    classifier: str = ""  # the experiment whose classifier `Step` reads; empty: this one
    iterations: Count | None = None  # PRC: how often the affinity is applied; None: as in training
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # as in step 1; PRC runs in fp32 always
    images_at_once: MayChange[PositiveCount] = 8  # patches of one batch; lower it when the GPU's memory is short


@torch.no_grad()
def class_maps(classifier: nn.Module, scaled_images: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Images at each scale (B,3,h,w) uint8 -> logits (B,K), then for each scale positive class maps (B,K,h/16,w/16).

    The maps of an image and those of its mirror image, mirrored back, are added; the logits are the
    mean over scales and mirror images. All are float32.
    """
    logits, maps = [], []
    for images in scaled_images:
        scale_logits, scale_maps = classifier(with_mirrors(images, device))
        plain, mirrored = scale_maps.relu().float().chunk(2)
        maps.append(plain + mirrored.flip(-1))
        logits.extend(scale_logits.float().chunk(2))
    return [torch.stack(logits).mean(0), *maps]


def main(args: Constants) -> None:
    step = Step("cams", args, image_labels=True)
    dataset, trained = step.dataset, step.run_of["classifier"].constants
    iterations = trained["iterations"] if args.iterations is None else args.iterations
    backbone = Backbone(trained["backbone"], "none")
    model = Classifier(backbone, dataset.num_classes, trained["gamma"], iterations, train_all=False)
    load_checkpoint(step.reads["classifier"] / "model.pt", model)
    model = for_inference(model, step.device)
    halving = Halving(args.images_at_once)

    with step.output(".npz"):
        pending = step.pending(step.ids, ".npz")
        batches = image_batches(
            dataset.images(step.split), pending, args.scales, args.images_at_once, args.workers, step.fail
        )
        with step.progress(len(pending), "CAMs") as bar, step.accelerator.autocast(), in_background() as submit:
            for ids, size, scaled_images in batches:
                outputs = halving.predict(partial(class_maps, model, device=step.device), scaled_images)
                logits, *maps = (output.cpu().numpy() for output in outputs)
                for index, id in enumerate(ids):
                    classes = np.flatnonzero(step.image_labels[id])
                    present = [of_scale[index, classes] for of_scale in maps]
                    submit(save_maps, step.path / f"{id}.npz", "cams", classes, present, size, logits[index])
                bar.update(len(ids))
        step.draw_maps(lambda id, image: load_maps(step.path / f"{id}.npz", dataset.num_classes, image.shape[:2]))


if __name__ == "__main__":
    run(main, Constants, __doc__, then=renew)
