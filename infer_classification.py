"""Step 2: class activation maps at four scales and their mirrors, with PRC (method section 2).

Reads  classifier/ and datasets/<dataset>/<split>/images with image_labels.csv
Writes experiments/<dataset>/<experiment>/cams/<id>.npz: the maps of the classes present, at feature size, in float16

    python infer_classification.py --dataset vaihingen
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from models.backbone import Backbone
from models.classifier import Classifier
from report.page import refresh
from tools.cams import check_inference, image_batches, in_background, load_cams, mirrored_scales, save_cams
from tools.command import UserError, check, run
from tools.dataset import load_dataset
from tools.labels import load_image
from tools.masks import load_masks
from tools.pictures import contact_sheet, heat, sample_ids
from tools.step import ROOT, StepFolder, experiment_folder, require, step_name
from tools.training import load_checkpoint, make_accelerator, precision_of


@dataclass(frozen=True)
class Constants:
    dataset: str = "vaihingen"  # vaihingen | potsdam | isaid | demo | the name of your own dataset.toml
    experiment: str = "prc"  # results go to experiments/<dataset>/<experiment>/
    split: Literal["train", "test"] = "train"  # for the pseudo-labels | test, to measure only: cams_test
    scales: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)  # each with its mirror
    classifier: str = ""  # the experiment whose classifier is used; empty: this one
    iterations: int | None = None  # PRC: how often the affinity is applied; None: as in training
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # as in step 1; PRC runs in fp32 always
    images_at_once: int = 8  # patches of one batch; lower it when the GPU's memory is short
    workers: int = 4  # processes that read images
    samples: int = 8  # patches on the contact sheet
    root: Path = ROOT  # folder that holds datasets/ and experiments/
    overwrite: bool = False  # start anew where the folder holds results of other constants


def main(constants: Constants) -> None:
    check_inference(constants)
    check((constants.iterations or 0) >= 0, f"iterations is {constants.iterations}, but it cannot be negative")
    dataset = load_dataset(constants.dataset, constants.root)
    experiment = experiment_folder(constants.root, constants.dataset, constants.experiment)
    classifier = (
        experiment_folder(constants.root, constants.dataset, constants.classifier or constants.experiment)
        / "classifier"
    )
    trained = require(classifier)
    labels = dataset.image_labels(constants.split)
    ids = sorted(labels)
    settings = trained["constants"]
    iterations = settings["iterations"] if constants.iterations is None else constants.iterations
    model = Classifier(Backbone(settings["backbone"], "none"), dataset.num_classes, settings["gamma"], iterations)
    load_checkpoint(classifier / "model.pt", model)
    accelerator = make_accelerator(constants.precision)
    constants = replace(constants, precision=precision_of(accelerator))
    model = model.to(accelerator.device).eval()
    folder = StepFolder(
        experiment / step_name("cams", constants.split, "train"),
        constants,
        {"classifier": trained},
        device=accelerator.device,
        state=accelerator,
    )

    pending = folder.pending(ids, ".npz")
    with folder.progress(len(pending), "CAMs") as bar, in_background() as submit:
        batches = image_batches(
            dataset.images(constants.split), pending, constants.images_at_once, constants.workers, folder.fail
        )
        for batch, images in batches:
            with accelerator.autocast():
                maps = mirrored_scales(lambda x: model(x)[1].relu(), images, constants.scales, accelerator.device)
            maps = [scale.cpu().numpy() for scale in maps]
            for index, id in enumerate(batch):
                classes = np.flatnonzero(labels[id])
                present = [scale[index, classes] for scale in maps]
                submit(save_cams, folder.folder / f"{id}.npz", classes, present, images.shape[-2:])
            bar.update(len(batch))

    folder.join()
    if accelerator.is_main_process:
        rows = []
        for id in sample_ids(ids, constants.samples):
            try:
                image = load_image(dataset.images(constants.split) / f"{id}.png")
                maps = dict(zip(*load_cams(folder.folder / f"{id}.npz"), strict=True))
            except UserError:  # told at the end already
                continue
            rows.append([image, *(heat(image, maps[k]) if k in maps else None for k in range(dataset.num_classes))])
        contact_sheet(folder.folder / "contact_sheet.png", rows, ["image", *dataset.classes])
    folder.close(".npz")
    refresh(folder, dataset, load_masks)


if __name__ == "__main__":
    run(main, Constants, __doc__)
