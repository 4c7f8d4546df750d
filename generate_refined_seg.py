"""Step 7: refine the segmentation with SAM's masks by IOS (method section 7).

Reads  segmentation/ and datasets/<dataset>/<split>/sam_masks; under the released protocol also the image-level labels
       of the split, which come from its truth; for rule mean_cam also the probabilities of step 6
Writes experiments/<dataset>/<experiment>/refined_segmentation/<id>.png

    python generate_refined_seg.py --dataset vaihingen
"""

from typing import Literal

from PRC_SAM.refine import Refinement, Rule, refine_folder
from report.page import renew
from tools.command import check, run
from tools.constants import Machine, Share, checked_constants
from tools.step import Step
from tools.steps import STEPS


@checked_constants
class Constants(Machine):
    dataset: str = "vaihingen"  # vaihingen | potsdam | isaid | demo | the name of your own dataset.toml
    experiment: str = "prc"  # results go to experiments/<dataset>/<experiment>/
    protocol: Literal["clean", "released"] = "clean"  # writes the predicted classes | released: those in the truth
    split: Literal["train", "test"] = "test"  # test | train (to measure only)
    rule: Rule = "ios"  # ios (the paper's) | sepl | vote | mean_cam, see PRC_SAM/refine.py
    tau: Share | None = None  # ios: minimum overlap, area(P and S) / min(area P, area S); None: the data set's


def main(args: Constants) -> None:
    released = args.protocol == "released"
    step = Step("refined_segmentation", args, image_labels=released)
    check(
        args.rule != "mean_cam" or any(step.sources["segmentation"].glob("*.npz")),
        "rule mean_cam needs the segmenter's probabilities: run "
        f"{STEPS['segmentation'].hint(args, split=step.split)} --keep-probabilities",
    )
    tau = step.method_value("tau", "tau_segmentation")
    refinement = Refinement(args.rule, tau, step.dataset.background)
    with step.output(".png"):
        refine_folder(step, "segmentation", refinement, step.labels if released else None, maps="segmentation")
        step.draw_labels({"segmentation": step.sources["segmentation"], "refined": step.path})


if __name__ == "__main__":
    run(main, Constants, __doc__, then=renew)
