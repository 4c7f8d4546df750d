"""Step 7: refine the segmentation with SAM's masks by IOS (method section 7).

Reads  segmentation/ and datasets/<dataset>/<split>/sam_masks; under the released protocol also the image-level labels
       of the split, which come from its truth
Writes experiments/<dataset>/<experiment>/refined_segmentation/<id>.png

    python generate_refined_seg.py --dataset vaihingen
"""

from functools import partial
from typing import Literal

from PRC_SAM.refine import refine_patch
from report.page import renew
from tools.command import run
from tools.constants import Machine, Share, constants
from tools.devices import process_state
from tools.step import Step


@constants
class Constants(Machine):
    dataset: str = "vaihingen"  # vaihingen | potsdam | isaid | demo | the name of your own dataset.toml
    experiment: str = "prc"  # results go to experiments/<dataset>/<experiment>/
    protocol: Literal["clean", "released"] = "clean"  # writes classes of the prediction | released: of the test truth
    split: Literal["train", "test"] = "test"  # test | train (to measure only)
    # IOS: minimum overlap of mask S and class region P, area(P and S) / min(area P, area S); None: the data set's
    tau: Share | None = None


def main(constants: Constants) -> None:
    released = constants.protocol == "released"
    step = Step("refined_segmentation", constants, image_labels=released)
    source = step.sources["segmentation"]
    tau = step.method_value("tau", "tau_segmentation")
    with step.output(".png", state=process_state(constants.device)):
        work = partial(
            refine_patch,
            source=source,
            output=step.path,
            masks=step.sources["sam_masks"],
            dataset=step.dataset,
            classes=step.labels if released else None,
            tau=tau,
        )
        step.each(work, step.pending(step.ids, ".png"), "refined segmentation")
        step.draw_labels({"segmentation": source, "refined": step.path})


if __name__ == "__main__":
    run(main, Constants, __doc__, then=renew)
