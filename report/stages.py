"""The stages of an experiment: folders that hold a label map, or CAMs, for each patch of a split."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from tools.labels import load_label
from tools.map_files import load_maps
from tools.runs import Run
from tools.scores import ConfusionMatrix
from tools.steps import STEPS, StepInfo, step_of

Split = Annotated[str, Field(pattern="^(train|test)$")]


@dataclass(eq=False)
class Stage:
    """A folder of label maps of an experiment and, once it is scored, its counts.

    `per_image`: id -> mIoU of that image alone; `present`: id -> how many classes of the mean its truth holds.
    """

    path: Path
    split: str
    run: Run
    matrix: ConfusionMatrix
    is_bound: bool = False  # of the fully supervised experiment
    per_image: dict[str, float] = field(default_factory=dict)
    present: dict[str, int] = field(default_factory=dict)
    partial: bool = False  # files are missing or damaged

    @property
    def step(self) -> StepInfo:
        return STEPS[self.path.name.removesuffix(f"_{self.split}")]

    @property
    def title(self) -> str:
        return ("fully supervised " if self.is_bound else "") + self.step.title

    @property
    def experiment(self) -> str:
        return self.path.parent.name


def load_prediction(folder: Path, id: str, num_classes: int, size: tuple[int, ...]) -> np.ndarray:
    """(H,W) uint8 class ids of one image of (H,W) = size; of CAMs, the class with the highest map."""
    if step_of(folder) is not STEPS["cams"]:
        return load_label(folder / f"{id}.png", num_classes)
    classes, maps = load_maps(folder / f"{id}.npz", num_classes, size)
    return classes.astype(np.uint8)[maps.argmax(axis=0)]
