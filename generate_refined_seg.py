"""Step 7: refine the segmentation with SAM's masks by IOS (method section 7).

Reads  segmentation/ and datasets/<dataset>/<split>/sam_masks; under the released protocol also the image-level labels
       of the split, which come from its truth
Writes experiments/<dataset>/<experiment>/refined_segmentation/<id>.png

    python generate_refined_seg.py --dataset vaihingen
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PRC_SAM.ios import refine_folder
from report.page import refresh
from tools.command import check, run
from tools.dataset import load_dataset
from tools.masks import load_masks
from tools.pictures import step_sheet
from tools.step import ROOT, StepFolder, experiment_folder, process_state, require, step_name


@dataclass(frozen=True)
class Constants:
    dataset: str = "vaihingen"  # vaihingen | potsdam | isaid | demo | the name of your own dataset.toml
    experiment: str = "prc"  # results go to experiments/<dataset>/<experiment>/
    protocol: Literal["clean", "released"] = "clean"  # writes classes of the prediction | released: of the test truth
    split: Literal["train", "test"] = "test"  # test | train (to measure only)
    tau: float = 0.1  # a mask and a region that overlap by this share of the smaller one agree
    workers: int = 4  # processes; 0 works in this one
    samples: int = 8  # patches on the contact sheet
    root: Path = ROOT  # folder that holds datasets/ and experiments/
    overwrite: bool = False  # start anew where the folder holds results of other constants


def main(constants: Constants) -> None:
    check(0 <= constants.tau <= 1, f"tau is {constants.tau}, but it must lie between 0 and 1")
    dataset = load_dataset(constants.dataset, constants.root)
    experiment = experiment_folder(constants.root, constants.dataset, constants.experiment)
    source = experiment / step_name("segmentation", constants.split, "test")
    inputs = {"segmentation": require(source), "sam_masks": require(dataset.sam_masks(constants.split))}
    state = process_state()
    folder = StepFolder(
        experiment / step_name("refined_segmentation", constants.split, "test"),
        constants,
        inputs,
        state=state,
    )
    classes_from = "image labels" if constants.protocol == "released" else "prediction"
    refine_folder(folder, source, dataset, constants.split, constants.tau, classes_from, constants.workers)

    folder.join()
    if state.is_main_process:
        step_sheet(
            folder.folder,
            dataset,
            constants.split,
            {"segmentation": source, "refined": folder.folder},
            constants.samples,
        )
    folder.close(".png")
    refresh(folder, dataset, load_masks)


if __name__ == "__main__":
    run(main, Constants, __doc__)
