"""Step 4: refine the pseudo-labels with SAM's masks by IOS, the intersection optimisation strategy (method section 4).

Reads  pseudo_labels/ and datasets/<dataset>/<split>/sam_masks with image_labels.csv; for rule mean_cam also cams/
Writes experiments/<dataset>/<experiment>/refined_pseudo_labels/<id>.png

    python generate_refined_pseudo.py --dataset vaihingen
"""

from typing import Literal

from PRC_SAM.refine import Refinement, Rule, refine_folder
from report.page import renew
from tools.command import run
from tools.constants import Machine, Share, checked_constants
from tools.step import Step


@checked_constants
class Constants(Machine):
    dataset: str = "vaihingen"  # vaihingen | potsdam | isaid | demo | the name of your own dataset.toml
    experiment: str = "prc"  # results go to experiments/<dataset>/<experiment>/
    split: Literal["train", "test"] = "train"  # train | test (to measure only)
    rule: Rule = "ios"  # ios (the paper's) | sepl | vote | mean_cam, see PRC_SAM/refine.py
    tau: Share | None = None  # ios: minimum overlap, area(P and S) / min(area P, area S); None: the data set's
    cams: str = ""  # mean_cam: the experiment whose CAMs are used; empty: this one


def main(args: Constants) -> None:
    maps = ("cams",) if args.rule == "mean_cam" else ()
    step = Step("refined_pseudo_labels", args, reads=("pseudo_labels", "sam_masks", *maps), image_labels=True)
    tau = step.method_value("tau", "tau_pseudo_labels")
    with step.output(".png"):
        refine_folder(step, "pseudo_labels", Refinement(args.rule, tau, step.dataset.background), step.labels)
        step.draw_labels({"pseudo-label": step.sources["pseudo_labels"], "refined": step.path})


if __name__ == "__main__":
    run(main, Constants, __doc__, then=renew)
