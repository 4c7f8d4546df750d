"""The stages of an experiment: folders that hold a label map, or CAMs, for each patch of a split."""

from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, Field

from tools.labels import load_label
from tools.map_files import load_maps
from tools.runs import Run
from tools.scores import ConfusionMatrix
from tools.steps import STEPS, StepInfo, step_of

Split = Annotated[str, Field(pattern="^(train|test)$")]
Pixels = Annotated[int, Field(ge=0, le=10**15)]


class Stage(BaseModel):
    """A folder of label maps and its pixel counts against the truth, from which every score follows.

    scores.json holds all but the last three, which step 8 alone has. `per_image`: id -> mIoU of that image alone;
    `present`: id -> how many classes of the mean its truth holds.
    """

    experiment: str
    stage: str  # name of the folder
    title: str
    split: Split
    images: int = 0  # scored
    partial: bool = False  # files are missing or damaged
    made: tuple[str, int]  # see `state_of`
    is_bound: bool = False  # of the fully supervised experiment
    stale: bool = False  # the folder has changed since
    confusion: list[list[Pixels]] = []  # (K, K+1): truth x prediction, the last column: no class predicted
    path: Path = Field(default=Path(), exclude=True)
    per_image: dict[str, float] = Field(default={}, exclude=True)
    present: dict[str, int] = Field(default={}, exclude=True)

    @property
    def step(self) -> StepInfo:
        return STEPS[self.stage.removesuffix(f"_{self.split}")]

    @property
    def matrix(self) -> ConfusionMatrix:
        return ConfusionMatrix(len(self.confusion), self.confusion)


def stage_of(path: Path, split: str, run: Run, is_bound: bool = False) -> Stage:
    """The stage in a folder, not scored yet."""
    title = ("fully supervised " if is_bound else "") + STEPS[path.name.removesuffix(f"_{split}")].title
    return Stage(
        experiment=path.parent.name,
        stage=path.name,
        title=title,
        split=split,
        made=state_of(run),
        is_bound=is_bound,
        path=path,
    )


def state_of(run: Run) -> tuple[str, int]:
    """When a folder was started and how many files it holds: by this a folder that was made again is recognised."""
    return run.started, run.files


def load_prediction(folder: Path, id: str, num_classes: int, size: tuple[int, ...]) -> np.ndarray:
    """(H,W) uint8 class ids of one image of (H,W) = size; of CAMs, the class with the highest map."""
    if step_of(folder) is not STEPS["cams"]:
        return load_label(folder / f"{id}.png", num_classes)
    classes, maps = load_maps(folder / f"{id}.npz", num_classes, size)
    return classes.astype(np.uint8)[maps.argmax(axis=0)]
