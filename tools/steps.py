"""The table of the steps: their folders, scripts, numbers, titles, and what each reads."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.constants import ROOT

SPLITS = ("train", "test")


def command_line(script: str, args: Any, **others: str | None) -> str:
    """The command that runs a script on the data set, experiment and root of `args`, quoted for a shell.

    `others` replaces some of these constants or adds further ones; None leaves one out.
    """
    options = {name: getattr(args, name, None) for name in ("dataset", "experiment", "root")} | others
    if options["root"] == ROOT:
        options["root"] = None
    return " ".join(["python", script, *(f"--{name} {shlex.quote(str(v))}" for name, v in options.items() if v)])


@dataclass(frozen=True)
class StepInfo:
    """One step of the method.

    `split` is the split it is made for, None where it has no split of its own. `reads` are the folders of the steps
    that it reads. `labels`: its folder holds a label map (or CAMs, whose argmax is one) for each patch.
    """

    folder: str
    script: str
    number: int
    title: str
    split: str | None = None
    reads: tuple[str, ...] = ()
    labels: bool = False

    def folder_of(self, split: str) -> str:
        """The folder name: plain for the split that the step is made for, with the split appended for the other."""
        return self.folder if self.split in (None, split) else f"{self.folder}_{split}"

    def hint(self, args: Any, **others: str) -> str:
        """ "step 2, python infer_classification.py --dataset ...", ready to paste; `others` are further constants."""
        return f"step {self.number}, {self.command(args, **others)}"

    def command(self, args: Any, **others: str) -> str:
        """`command_line` of this step."""
        without: dict[str, str | None] = {"experiment": None} if self.folder == "sam_masks" else {}
        return command_line(self.script, args, **(others | without))


STEPS = {
    step.folder: step
    for step in (
        StepInfo("sam_masks", "PRC_SAM/get_se_map.py", 9, "SAM masks"),
        StepInfo("classifier", "train_classification.py", 1, "classifier"),
        StepInfo("cams", "infer_classification.py", 2, "CAM, argmax", "train", ("classifier",), labels=True),
        StepInfo("pseudo_labels", "make_pseudo_labels.py", 3, "pseudo-label", "train", ("cams",), labels=True),
        StepInfo(
            "refined_pseudo_labels",
            "generate_refined_pseudo.py",
            4,
            "refined pseudo-label",
            "train",
            ("pseudo_labels", "sam_masks"),
            labels=True,
        ),
        StepInfo("segmenter", "train_segmentation.py", 5, "segmenter", None, ("refined_pseudo_labels",)),
        StepInfo("segmentation", "inference_segmentation.py", 6, "segmentation", "test", ("segmenter",), labels=True),
        StepInfo(
            "refined_segmentation",
            "generate_refined_seg.py",
            7,
            "refined segmentation",
            "test",
            ("segmentation", "sam_masks"),
            labels=True,
        ),
        StepInfo("scores", "evaluate_miou.py", 8, "scores"),
    )
}
SCENES = StepInfo("scenes", "segment_scene.py", 6, "scenes", None, ("segmenter",))  # step 6 for whole large images
LABEL_STEPS = {name: step for name, step in STEPS.items() if step.labels}


def step_of(folder: Path | str) -> StepInfo | None:
    """The step that makes a folder of this name, such as cams_test; None for any other folder."""
    name = Path(folder).name
    for split in SPLITS:
        if name not in STEPS:
            name = name.removesuffix(f"_{split}")
    return STEPS.get(name)


def next_step(step: StepInfo) -> StepInfo | None:
    """The step that follows; step 9's masks are made before step 1."""
    order = list(STEPS.values())
    following = order[order.index(step) + 1 :]
    return following[0] if following else None
