"""Step 3: pseudo-labels from the class activation maps by a dense CRF (method section 3).

Reads  cams/ and datasets/<dataset>/<split>/images
Writes experiments/<dataset>/<experiment>/pseudo_labels/<id>.png: class ids, no ignored pixel

    python make_pseudo_labels.py --dataset vaihingen
"""

from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from skimage.filters import threshold_otsu

from models.crf import dense_crf
from report.page import renew
from tools.command import UserError, check, run
from tools.constants import Count, Machine, NonNegative, Positive, checked_constants
from tools.dataset import Dataset
from tools.labels import load_image, save_label
from tools.map_files import load_maps
from tools.step import Step


@checked_constants
class Constants(Machine):  # and root, overwrite, workers, samples, device
    dataset: str = "vaihingen"  # vaihingen | potsdam | isaid | demo | the name of your own dataset.toml
    experiment: str = "prc"  # results go to experiments/<dataset>/<experiment>/
    split: Literal["train", "test"] = "train"  # train | test (to measure only)
    cams: str = ""  # the experiment whose CAMs `Step` reads; empty: this one
    background: Literal["cam", "threshold"] = "cam"  # threshold: an extension, see thresholded_background
    crf_iterations: Count = 10  # mean-field iterations; 0: no CRF, the highest map wins
    gaussian_sigma: Positive = 1.0  # of the kernel on position; pixels, above 0
    gaussian_weight: NonNegative = 3.0  # of that kernel; 0 leaves it out
    bilateral_sigma_xy: Positive = 67.0  # of the kernel on position and colour; pixels, above 0
    bilateral_sigma_rgb: Positive = 3.0  # of that kernel; colour values (0 to 255), above 0
    bilateral_weight: NonNegative = 4.0  # of that kernel; 0 leaves it out


def thresholded_background(classes: np.ndarray, maps: np.ndarray, background: int) -> np.ndarray:
    """An extension: the background's map becomes constant, at Otsu's threshold of the strongest other map.

    The paper uses the background's own CAM. The background is in nearly every image, so a classifier hardly learns to
    locate it. Otsu's threshold uses no label either.
    """
    others = classes != background
    if others.all() or not others.any():
        return maps
    maps = maps.copy()
    maps[~others] = threshold_otsu(maps[others].max(0))
    return maps


def make_label(id: str, *, cams: Path, output: Path, dataset: Dataset, args: Constants) -> None:
    """One patch: maps of its classes -> CRF -> the most probable class of each pixel."""
    image = load_image(dataset.images(args.split) / f"{id}.png")
    classes, maps = load_maps(cams / f"{id}.npz", dataset.num_classes, image.shape[:2])
    if args.background == "threshold" and dataset.background is not None:
        maps = thresholded_background(classes, maps, dataset.background)
    if args.crf_iterations > 0 and len(classes) > 1:  # of one class alone every pixel has that class
        try:
            maps = dense_crf(
                maps,
                image,
                iterations=args.crf_iterations,
                gaussian_sigma=args.gaussian_sigma,
                gaussian_weight=args.gaussian_weight,
                bilateral_sigma_xy=args.bilateral_sigma_xy,
                bilateral_sigma_rgb=args.bilateral_sigma_rgb,
                bilateral_weight=args.bilateral_weight,
            )
        except ValueError as error:  # whether the sigmas are too small for the lattice depends on the image
            raise UserError(f"{id}: {error}") from None
    save_label(output / f"{id}.png", classes[maps.argmax(0)].astype(np.uint8), dataset.colours)


def check_constants(args: Constants, dataset: Dataset) -> None:
    """Raise `UserError` for constants that cannot work with this data set, before anything is made."""
    check(
        args.background == "cam" or dataset.background is not None,
        f'background is threshold, but the [rules] of "{dataset.name}" name no background class',
    )


def main(args: Constants) -> None:
    step = Step("pseudo_labels", args)
    check_constants(args, step.dataset)
    if args.background == "threshold":
        step.notes["extension"] = "background by Otsu's threshold"
    with step.output(".png"):
        work = partial(make_label, cams=step.reads["cams"], output=step.path, dataset=step.dataset, args=args)
        step.each(work, step.pending(step.ids, ".png"), "pseudo-labels")
        step.warn_of_labels(step.path, "look at the contact sheet of step 2, and train the classifier of step 1 better")
        step.draw_labels({"pseudo-label": step.path})


if __name__ == "__main__":
    run(main, Constants, __doc__, then=renew)
