"""Step 7: refine the segmentation with SAM's masks by IOS (method section 7).

Reads  segmentation/ and datasets/<dataset>/<split>/sam_masks; under the released protocol also the image-level labels
       of the split, which come from its truth; for rule mean_cam also the probabilities of step 6
Writes experiments/<dataset>/<experiment>/refined_segmentation/<id>.png

    python generate_refined_seg.py --dataset vaihingen
"""

from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from PRC_SAM.refine import Refinement, Rule
from report.page import renew
from tools.command import check, run
from tools.constants import Machine, Share, checked_constants
from tools.dataset import Dataset
from tools.labels import IGNORE, load_label, save_label
from tools.map_files import load_maps
from tools.masks import load_masks
from tools.step import Step
from tools.steps import STEPS


@checked_constants
class Constants(Machine):  # and root, overwrite, workers, samples, device
    dataset: str = "vaihingen"  # vaihingen | potsdam | isaid | demo | the name of your own dataset.toml
    experiment: str = "prc"  # results go to experiments/<dataset>/<experiment>/
    protocol: Literal["clean", "released"] = "clean"  # writes classes of the prediction | released: of the truth
    split: Literal["train", "test"] = "test"  # test | train (to measure only)
    rule: Rule = "ios"  # ios (the paper's) | sepl | vote | mean_cam, see PRC_SAM/refine.py
    tau: Share | None = None  # ios: minimum of |P and S| / min(|P|, |S|), class region P, mask S; None: the data set's


def refine_patch(
    patch: tuple[str, np.ndarray | None],
    *,
    reads: dict[str, Path],
    output: Path,
    dataset: Dataset,
    refinement: Refinement,
) -> None:
    """One patch, id and image-level label (K,) bool or None: label map and masks -> the rule -> refined label map.

    Without an image-level label the classes of the label map may be written.
    """
    id, image_label = patch
    label = load_label(reads["segmentation"] / f"{id}.png", dataset.num_classes)
    masks = load_masks(reads["sam_masks"] / f"{id}.npz", label.shape)
    classes = np.setdiff1d(label, [IGNORE]) if image_label is None else np.flatnonzero(image_label)
    maps = {}
    if refinement.rule == "mean_cam":
        ids, values = load_maps(reads["segmentation"] / f"{id}.npz", dataset.num_classes, label.shape)
        maps = dict(zip(ids, values, strict=True))
    refined = refinement(label, masks, classes, maps)
    save_label(output / f"{id}.png", refined, dataset.colours)


def main(args: Constants) -> None:
    released = args.protocol == "released"
    step = Step("refined_segmentation", args, image_labels=released)
    check(
        args.rule != "mean_cam" or any(step.reads["segmentation"].glob("*.npz")),
        "rule mean_cam needs the segmenter's probabilities: run "
        f"{STEPS['segmentation'].hint(args, split=step.split)} --keep-probabilities",
    )
    tau = step.method_value("tau", "tau_segmentation")
    image_labels = step.image_labels if released else {}
    with step.output(".png"):
        work = partial(
            refine_patch,
            reads=step.reads,
            output=step.path,
            dataset=step.dataset,
            refinement=Refinement(args.rule, tau, step.dataset.background),
        )
        # each item carries its own image-level label: `work` goes to the workers with every item
        patches = [(id, image_labels.get(id)) for id in step.pending(step.ids, ".png")]
        step.each(work, patches, step.info.title)
        step.draw_labels({"segmentation": step.reads["segmentation"], "refined": step.path})


if __name__ == "__main__":
    run(main, Constants, __doc__, then=renew)
