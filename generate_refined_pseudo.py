"""Step 4: refine the pseudo-labels with SAM's masks by IOS, the intersection optimisation strategy (method section 4).

Reads  pseudo_labels/ and datasets/<dataset>/<split>/sam_masks with image_labels.csv
Writes experiments/<dataset>/<experiment>/refined_pseudo_labels/<id>.png

    python generate_refined_pseudo.py --dataset vaihingen
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
    split: Literal["train", "test"] = "train"  # train | test (to measure only)
    # IOS: minimum overlap of mask S and class region P, area(P and S) / min(area P, area S); None: the data set's
    tau: Share | None = None


def main(constants: Constants) -> None:
    step = Step("refined_pseudo_labels", constants, image_labels=True)
    source = step.sources["pseudo_labels"]
    tau = step.method_value("tau", "tau_pseudo_labels")
    with step.output(".png", state=process_state(constants.device)):
        work = partial(
            refine_patch,
            source=source,
            output=step.path,
            masks=step.sources["sam_masks"],
            dataset=step.dataset,
            classes=step.labels,
            tau=tau,
        )
        step.each(work, step.pending(step.ids, ".png"), "refined pseudo-labels")
        step.draw_labels({"pseudo-label": source, "refined": step.path})


if __name__ == "__main__":
    run(main, Constants, __doc__, then=renew)
