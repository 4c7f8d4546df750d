"""Step 6: label maps by the segmenter, four scales and their mirrors, no CRF (method section 6).

With --scene, whole large images instead of the test patches: windows of patch_size that overlap, their logits blended.
A GeoTIFF gives a GeoTIFF at the same place on the map, a png or jpg a palette png.

Reads  segmenter/ and datasets/<dataset>/<split>/images, or the scenes
Writes experiments/<dataset>/<experiment>/segmentation/<id>.png: class ids
       experiments/<dataset>/<experiment>/scenes/<name>.tif or .png: class ids, 255 where the scene holds no image;
       scenes/overview/<name>.png to look at

    python inference_segmentation.py --dataset vaihingen
    python inference_segmentation.py --dataset fields --scene FILE [FILE ...]
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.backbone import Backbone
from models.deeplab import DeepLabV3Plus
from report.page import refresh
from tools.cams import check_inference, image_batches, in_background, mirrored_scales
from tools.command import check, run
from tools.dataset import load_dataset
from tools.labels import save_label
from tools.masks import load_masks
from tools.pictures import step_sheet
from tools.rasters import Raster
from tools.scene_windows import Windows, check_scenes, predict_scenes
from tools.step import ROOT, StepFolder, experiment_folder, require, step_name
from tools.training import load_checkpoint, make_accelerator, precision_of


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
    scene: tuple[Path, ...] = ()  # large images to segment instead of the split: tif, png or jpg
    overlap: float = 0.25  # scenes: share of a window's side that it has in common with the next one, 0 to 0.75
    nodata: int = -1  # scenes: pixels with this value in all channels are no image; -1: those that the file names
    grey: Literal["stop", "repeat"] = "stop"  # scenes with one channel: stop, or repeat it three times
    root: Path = ROOT  # folder that holds datasets/ and experiments/
    overwrite: bool = False  # start anew where the folder holds results of other constants


def main(constants: Constants) -> None:
    check_inference(constants)
    check(0 <= constants.overlap <= 0.75, f"overlap is {constants.overlap}, but it must be from 0 to 0.75")
    check(-1 <= constants.nodata <= 255, f"nodata is {constants.nodata}, but it must be from 0 to 255, or -1")
    check_scenes(constants.scene)
    dataset = load_dataset(constants.dataset, constants.root)
    experiment = experiment_folder(constants.root, constants.dataset, constants.experiment)
    trained = require(experiment / "segmenter")
    ids = [] if constants.scene else dataset.ids(constants.split)
    settings = trained["constants"]
    check(
        settings["dataset"] == dataset.name,
        f"{experiment / 'segmenter'} was trained on {settings['dataset']}: name that one, or train on {dataset.name}",
    )
    model = DeepLabV3Plus(Backbone(settings["backbone"], "none"), dataset.num_classes, settings["width"])
    load_checkpoint(experiment / "segmenter" / "model.pt", model)
    accelerator = make_accelerator(constants.precision)
    constants = replace(constants, precision=precision_of(accelerator))
    model = model.to(accelerator.device).eval()
    folder = StepFolder(
        experiment / ("scenes" if constants.scene else step_name("segmentation", constants.split, "test")),
        constants,
        {"segmenter": trained},
        device=accelerator.device,
        state=accelerator,
        settings={"window": dataset.patch_size} if constants.scene else None,
    )

    def predict(images: Tensor) -> Tensor:
        """(B,3,H,W) uint8 -> logits (B,K,H,W) of all scales and mirrors."""
        with accelerator.autocast(), torch.inference_mode():
            logits = mirrored_scales(model, images, constants.scales, accelerator.device)
            return sum(
                F.interpolate(scale, images.shape[-2:], mode="bilinear", align_corners=False) for scale in logits
            )

    if constants.scene:
        stride = max(1, round(dataset.patch_size * (1 - constants.overlap)))
        windows = Windows(dataset.patch_size, stride, constants.images_at_once)
        kinds = ("rgb", "holes", "grey") if constants.grey == "repeat" else ("rgb", "holes")
        open_image = partial(Raster, kinds=kinds, nodata=constants.nodata)
        predict_scenes(constants.scene, folder, predict, dataset, windows, open_image)
        folder.join()
        folder.close("", files=len(list((folder.folder / "made_from").glob("*.json"))))
        return

    pending = folder.pending(ids, ".png")
    with folder.progress(len(pending), "segmentation") as bar, in_background() as submit:
        batches = image_batches(
            dataset.images(constants.split), pending, constants.images_at_once, constants.workers, folder.fail
        )
        for batch, images in batches:
            labels = predict(images).argmax(1).to(torch.uint8).cpu().numpy()
            for id, label in zip(batch, labels[: len(batch)], strict=True):
                submit(save_label, folder.folder / f"{id}.png", np.ascontiguousarray(label), dataset.colours)
            bar.update(len(batch))

    folder.join()
    if accelerator.is_main_process:
        step_sheet(folder.folder, dataset, constants.split, {"segmentation": folder.folder}, constants.samples)
    folder.close(".png")
    refresh(folder, dataset, load_masks)


if __name__ == "__main__":
    run(main, Constants, __doc__)
