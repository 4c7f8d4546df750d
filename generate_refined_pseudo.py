"""Step 4: refine the pseudo-labels with SAM's masks by IOS, the intersection optimisation strategy (method section 4).

Reads  pseudo_labels/ and datasets/<dataset>/<split>/sam_masks with image_labels.csv; for rule mean_cam also cams/
Writes experiments/<dataset>/<experiment>/refined_pseudo_labels/<id>.png

    python generate_refined_pseudo.py --dataset vaihingen
"""

from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from PRC_SAM.refine import Refinement, Rule
from report.page import renew
from tools.command import run
from tools.constants import Machine, Share, checked_constants
from tools.dataset import Dataset
from tools.labels import load_label, save_label
from tools.map_files import load_maps
from tools.masks import load_masks
from tools.step import Step


@checked_constants
class Constants(Machine):  # and root, overwrite, workers, samples, device
    dataset: str = "vaihingen"  # vaihingen | potsdam | isaid | demo | the name of your own dataset.toml
    experiment: str = "prc"  # results go to experiments/<dataset>/<experiment>/
    split: Literal["train", "test"] = "train"  # train | test (to measure only)
    rule: Rule = "ios"  # ios (the paper's) | sepl | vote | mean_cam, see PRC_SAM/refine.py
    tau: Share | None = None  # ios: minimum of |P and S| / min(|P|, |S|), class region P, mask S; None: the data set's
    cams: str = ""  # mean_cam: the experiment whose CAMs `Step` reads; empty: this one


def refine_patch(
    patch: tuple[str, np.ndarray],
    *,
    reads: dict[str, Path],
    output: Path,
    dataset: Dataset,
    refinement: Refinement,
) -> None:
    """One patch, id and image-level label (K,) bool: pseudo-label and masks -> the rule -> refined pseudo-label."""
    id, image_label = patch
    label = load_label(reads["pseudo_labels"] / f"{id}.png", dataset.num_classes)
    masks = load_masks(reads["sam_masks"] / f"{id}.npz", label.shape)
    maps = {}
    if refinement.rule == "mean_cam":
        ids, values = load_maps(reads["cams"] / f"{id}.npz", dataset.num_classes, label.shape)
        maps = dict(zip(ids, values, strict=True))
    refined = refinement(label, masks, np.flatnonzero(image_label), maps)
    save_label(output / f"{id}.png", refined, dataset.colours)


def main(args: Constants) -> None:
    maps = ("cams",) if args.rule == "mean_cam" else ()
    step = Step("refined_pseudo_labels", args, reads=("pseudo_labels", "sam_masks", *maps), image_labels=True)
    tau = step.method_value("tau", "tau_pseudo_labels")
    with step.output(".png"):
        work = partial(
            refine_patch,
            reads=step.reads,
            output=step.path,
            dataset=step.dataset,
            refinement=Refinement(args.rule, tau, step.dataset.background),
        )
        # each item carries its own image-level label: `work` goes to the workers with every item
        patches = [(id, step.image_labels[id]) for id in step.pending(step.ids, ".png")]
        step.each(work, patches, step.info.title)
        step.draw_labels({"pseudo-label": step.reads["pseudo_labels"], "refined": step.path})


if __name__ == "__main__":
    run(main, Constants, __doc__, then=renew)
