"""Step 3: pseudo-labels from the class activation maps by a dense CRF (method section 3).

Reads  cams/ and datasets/<dataset>/<split>/images
Writes experiments/<dataset>/<experiment>/pseudo_labels/<id>.png: class ids, no ignored pixel

    python make_pseudo_labels.py --dataset vaihingen
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from skimage.filters import threshold_otsu

from models.crf import dense_crf
from report.page import refresh
from tools.cams import load_cams
from tools.command import UserError, check, run
from tools.dataset import Dataset, load_dataset
from tools.labels import load_image, save_label
from tools.masks import load_masks
from tools.pictures import step_sheet
from tools.step import ROOT, StepFolder, experiment_folder, process_state, require, step_name


@dataclass(frozen=True)
class Constants:
    dataset: str = "vaihingen"  # vaihingen | potsdam | isaid | demo | the name of your own dataset.toml
    experiment: str = "prc"  # results go to experiments/<dataset>/<experiment>/
    split: Literal["train", "test"] = "train"  # train | test (to measure only)
    cams: str = ""  # the experiment whose CAMs are used; empty: this one
    crf_iterations: int = 10  # mean-field iterations; 0 takes the class of the highest CAM as it is
    crf_mode: Literal["lattice", "exact"] = "lattice"  # or exact: slow above 128 px without a GPU
    gaussian_sigma: float = 1.0  # pixels
    gaussian_weight: float = 3.0  # of the kernel of neighbours
    bilateral_sigma_xy: float = 67.0  # pixels
    bilateral_sigma_rgb: float = 3.0  # grey values
    bilateral_weight: float = 4.0  # of the kernel of neighbours of like colour
    background: Literal["cam", "threshold"] = "cam"  # threshold is an extension: thresholded_background
    workers: int = 4  # processes; 0 works in this one
    samples: int = 8  # patches on the contact sheet
    root: Path = ROOT  # folder that holds datasets/ and experiments/
    overwrite: bool = False  # start anew where the folder holds results of other constants


def thresholded_background(classes: np.ndarray, maps: np.ndarray, background: int) -> np.ndarray:
    """An extension: the background's map becomes constant, at Otsu's threshold of the strongest other map.

    The paper takes the background's own CAM. A classifier sees the background in nearly every image and so has little
    reason to locate it; Otsu's threshold uses no label either.
    """
    others = classes != background
    if others.all() or not others.any():
        return maps
    strongest = maps[others].max(0)
    maps = maps.copy()
    maps[~others] = threshold_otsu(strongest)
    return maps


def make_label(id: str, cams: Path, output: Path, dataset: Dataset, constants: Constants, device: str) -> None:
    """One patch: maps of its classes -> CRF -> the most probable class of each pixel."""
    classes, maps = load_cams(cams / f"{id}.npz")
    image = load_image(dataset.images(constants.split) / f"{id}.png")
    if maps.shape[1:] != image.shape[:2]:
        raise UserError(
            f"{cams / id}.npz was made from an image of another size than {id}.png: run step 2 with --overwrite"
        )
    if constants.background == "threshold":
        maps = thresholded_background(classes, maps, dataset.classes.index(dataset.rules["background"]))
    if constants.crf_iterations and len(classes) > 1:
        try:
            maps = dense_crf(
                maps,
                image,
                constants.crf_iterations,
                constants.gaussian_sigma,
                constants.gaussian_weight,
                constants.bilateral_sigma_xy,
                constants.bilateral_sigma_rgb,
                constants.bilateral_weight,
                constants.crf_mode,
                device,
            )
        except ValueError as error:  # sigmas too small for the lattice show with an image only
            raise UserError(f"{id}: {error}") from None
    save_label(output / f"{id}.png", classes[maps.argmax(0)].astype(np.uint8), dataset.colours)


def check_constants(constants: Constants, dataset: Dataset) -> None:
    """Raise `UserError` for constants that cannot work with this data set, before anything is made."""
    check(constants.crf_iterations >= 0, f"crf_iterations is {constants.crf_iterations}, but it cannot be negative")
    sigmas = (constants.gaussian_sigma, constants.bilateral_sigma_xy, constants.bilateral_sigma_rgb)
    check(all(0 < x < math.inf for x in sigmas), f"the sigmas of the CRF are {sigmas}, but they must be above 0")
    weights = (constants.gaussian_weight, constants.bilateral_weight)
    check(all(0 <= x < math.inf for x in weights), f"the weights of the CRF are {weights}, but they must be 0 or more")
    check(
        constants.background == "cam" or dataset.rules.get("background") in dataset.classes,
        f'background is threshold, but the [rules] of "{dataset.name}" name no background class',
    )


def main(constants: Constants) -> None:
    dataset = load_dataset(constants.dataset, constants.root)
    check_constants(constants, dataset)
    experiment = experiment_folder(constants.root, constants.dataset, constants.experiment)
    source = experiment_folder(constants.root, constants.dataset, constants.cams or constants.experiment)
    cams = source / step_name("cams", constants.split, "train")
    made, ids, state = require(cams), dataset.ids(constants.split), process_state()
    exact_on_gpu = constants.crf_mode == "exact" and state.device.type == "cuda"
    device = str(state.device) if exact_on_gpu else "cpu"
    notes = {"extension": "background by Otsu's threshold"} if constants.background == "threshold" else {}
    folder = StepFolder(
        experiment / step_name("pseudo_labels", constants.split, "train"),
        constants,
        {"cams": made},
        notes,
        device=device,
        state=state,
    )
    work = partial(make_label, cams=cams, output=folder.folder, dataset=dataset, constants=constants, device=device)
    folder.each(work, folder.pending(ids, ".png"), 0 if exact_on_gpu else constants.workers, "pseudo-labels")

    folder.join()
    if state.is_main_process:
        step_sheet(folder.folder, dataset, constants.split, {"pseudo-label": folder.folder}, constants.samples)
    folder.close(".png")
    refresh(folder, dataset, load_masks)


if __name__ == "__main__":
    run(main, Constants, __doc__)
