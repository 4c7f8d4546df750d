"""Step 6: label maps by the segmenter, four scales and their mirrors, no CRF (method section 6).

Reads  segmenter/ and datasets/<dataset>/<split>/images
Writes experiments/<dataset>/<experiment>/segmentation/<id>.png

    python inference_segmentation.py --dataset vaihingen
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from models.backbone import Backbone
from models.deeplab import DeepLabV3Plus
from tools.cams import image_batches, mirrored_scales
from tools.command import check, run
from tools.dataset import load_dataset
from tools.folders import ROOT, StepFolder, experiment_folder, require, step_name
from tools.labels import save_label
from tools.pictures import step_sheet
from tools.training import load_checkpoint, make_accelerator


@dataclass(frozen=True)
class Constants:
    dataset: str = "vaihingen"  # vaihingen | potsdam | isaid | demo | the name of your own dataset.toml
    experiment: str = "prc"  # results go to experiments/<dataset>/<experiment>/
    split: Literal["train", "test"] = "test"  # test | train (to measure only; goes to segmentation_train)
    scales: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)  # each with its mirror
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # as in step 5
    images_at_once: int = 8  # patches of one batch; lower it when the GPU's memory is short
    workers: int = 4  # processes that read images
    samples: int = 8  # patches on the contact sheet
    root: Path = ROOT  # folder that holds datasets/ and experiments/
    overwrite: bool = False  # start anew where the folder holds results of other constants


def main(constants: Constants) -> None:
    check(
        len(constants.scales) > 0 and min(constants.scales) > 0,
        f"scales is {constants.scales}, but needs positive numbers",
    )
    check(constants.images_at_once > 0, f"images_at_once is {constants.images_at_once}, but it must be at least 1")
    check(constants.workers >= 0, f"workers is {constants.workers}, but it must be 0 or more")
    dataset = load_dataset(constants.dataset, constants.root)
    experiment = experiment_folder(constants.root, constants.dataset, constants.experiment)
    trained, ids = require(experiment / "segmenter"), dataset.ids(constants.split)
    settings = trained["constants"]
    model = DeepLabV3Plus(Backbone(settings["backbone"], "none"), dataset.num_classes, settings["width"])
    load_checkpoint(experiment / "segmenter" / "model.pt", model)
    accelerator = make_accelerator(constants.precision)
    model = model.to(accelerator.device).eval()
    folder = StepFolder(
        experiment / step_name("segmentation", constants.split, "test"),
        constants,
        {"segmenter": trained},
        device=accelerator.device,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
    )

    pending = folder.pending(ids, ".png")
    with tqdm(total=len(pending), desc="segmentation", unit="image", disable=None) as bar:
        batches = image_batches(
            dataset.images(constants.split), pending, constants.images_at_once, constants.workers, folder.fail
        )
        for batch, images in batches:
            with accelerator.autocast(), torch.inference_mode():
                logits = mirrored_scales(model, images, constants.scales, accelerator.device)
                total = sum(
                    F.interpolate(scale, images.shape[-2:], mode="bilinear", align_corners=False) for scale in logits
                )
                labels = total.argmax(1).to(torch.uint8).cpu().numpy()
            for id, label in zip(batch, labels[: len(batch)], strict=True):
                save_label(folder.folder / f"{id}.png", np.ascontiguousarray(label), dataset.colours)
            bar.update(len(batch))

    folder.join()
    if accelerator.is_main_process:
        step_sheet(folder.folder, dataset, constants.split, {"segmentation": folder.folder}, constants.samples)
    folder.close(".png")


if __name__ == "__main__":
    run(main, Constants, __doc__)
