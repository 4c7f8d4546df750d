"""What is known of an experiment: its runs, and the scores that follow from the counts of its label folders."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, Field, model_validator

from report.label_folders import LabelFolder, Split
from tools.dataset import Dataset
from tools.runs import Run
from tools.scores import ConfusionMatrix

FACTS = {"seed": "seed", "backbone": "backbone", "weights": "weights", "protocol": "protocol of the steps"}
MISSED = 0.01  # IoU below which a class counts as not found
Pixels = Annotated[int, Field(ge=0, le=10**15)]
Row = dict[str, Any]


class Scored(BaseModel):
    """One label folder and its pixel counts against the truth, from which every score follows."""

    experiment: str
    stage: str  # name of the folder
    title: str
    split: Split
    images: int  # scored
    partial: bool  # files were missing or damaged
    made: tuple[str, int]  # see `made`
    is_bound: bool  # of the fully supervised experiment
    stale: bool = False  # the folder has changed since
    confusion: list[list[Pixels]]  # (K, K+1): truth x prediction, the last column: no class predicted

    @property
    def matrix(self) -> ConfusionMatrix:
        matrix = ConfusionMatrix(len(self.confusion))
        matrix.counts += np.array(self.confusion)
        return matrix


def scored(folder: LabelFolder) -> Scored:
    """A label folder after step 8 has counted it."""
    return Scored(
        experiment=folder.experiment,
        stage=folder.path.name,
        title=folder.title,
        split=folder.split,
        images=len(folder.per_image),
        partial=folder.partial,
        made=made(folder.run),
        is_bound=folder.is_bound,
        confusion=folder.matrix.counts.tolist(),
    )


def made(run: Run) -> tuple[str, int]:
    """When a folder was started and how many files it holds: by this a folder that was made again is recognised."""
    return run.started, run.files


class ScoresFile(BaseModel):
    """What is read back of scores.json; its scores are computed again from the counts."""

    protocol: Literal["clean", "released"] = "clean"
    classes: list[str] = []
    stages: list[Scored] = []

    @model_validator(mode="after")
    def counts_fit_the_classes(self) -> Self:
        count = len(self.classes)
        for stage in self.stages:
            if len(stage.confusion) != count or any(len(row) != count + 1 for row in stage.confusion):
                raise ValueError(f"the counts of {stage.stage} do not fit the {count} classes")
        return self


@dataclass(frozen=True)
class Summary:
    """What is known of an experiment: its runs and, once step 8 has been run, its counts."""

    args: Any  # with dataset, experiment and root, for the commands that the page shows
    dataset: Dataset
    folder: Path  # of the experiment
    runs: dict[str, Run]  # in the order of their start
    outdated: set[str]  # runs whose inputs have changed since
    broken: list[str]  # a sentence for each damaged run.json, scores.json, samples.json
    protocol: str = "clean"
    stages: list[Scored] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    bound_runs: dict[str, Run] = field(default_factory=dict)  # of the fully supervised experiment

    @property
    def experiment(self) -> str:
        return self.folder.name

    @cached_property
    def rows(self) -> list[Row]:
        """Each scored folder with its scores: fractions from 0 to 1, None where a score is not defined."""
        rows = [stage.model_dump() | self._scores(stage.matrix) for stage in self.stages]
        bounds = {}
        for row in rows:
            if row["is_bound"] and row["stage"].startswith("segmentation"):
                bounds[row["split"]] = row["miou"]
        for row in rows:
            bound = bounds.get(row["split"])
            row["share_of_supervised"] = row["miou"] / bound if bound and row["miou"] is not None else None
        return rows

    @cached_property
    def last(self) -> dict[str, Row]:
        """Split -> the last scored folder of this experiment."""
        return {row["split"]: row for row in self.rows if row["experiment"] == self.experiment}

    @cached_property
    def constant(self) -> dict[str, Row]:
        """Split -> the scores of a map that is the truth's most frequent class everywhere: the least to surpass."""
        found: dict[str, Row] = {}
        for stage in self.stages:
            if stage.images <= found.get(stage.split, {"images": -1})["images"]:
                continue  # the same truth, of no more images
            k, matrix = constant_map(stage.matrix, self.dataset.scored)
            found[stage.split] = self._scores(matrix) | {"class": self.dataset.classes[k], "images": stage.images}
        return found

    def _scores(self, matrix: ConfusionMatrix) -> Row:
        counts, every = matrix.counts, matrix.scores()
        pixels = max(counts.sum(), 1)
        scores = matrix.scores(np.flatnonzero(~self.dataset.scored), self.protocol) | {
            "miou_all_classes": every["miou"],
            "all_classes": every,
            "truth_share": counts.sum(axis=1) / pixels,
            "predicted_share": counts.sum(axis=0)[:-1] / pixels,
        }
        return plain(scores)

    @cached_property
    def facts(self) -> dict[str, list[str]]:
        """What the figures rest on: each constant of `FACTS` and each note of the steps, with all its values."""
        found: dict[str, list[str]] = {}
        for run in self.runs.values():
            constants = {title: run.constants[key] for key, title in FACTS.items() if key in run.constants}
            if "weights" in constants:  # of a file, its name is enough
                constants["weights"] = Path(str(constants["weights"])).name
            for title, value in (constants | {key.replace("_", " "): v for key, v in run.notes.items()}).items():
                values = map(str, value if isinstance(value, list) else [value])
                found[title] = list(dict.fromkeys([*found.get(title, []), *values]))
        return found

    @cached_property
    def warnings(self) -> list[str]:
        """What a reader must know before trusting a figure."""
        found = [f"A stand-in was used: {text}." for text in self.facts.get("stand in", [])]
        if "released" in (self.protocol, *self.facts.get(FACTS["protocol"], [])):
            found.append(
                "Released protocol: pixel truth was used where a weakly supervised method has none, or pixels "
                "predicted as a left-out class were dropped. The clean protocol is the fair one."
            )
        if partial := sum(stage.partial for stage in self.stages):
            found.append(f"Partial scores: {partial} of the label folders have missing or damaged files.")
        if stale := [stage.title for stage in self.stages if stage.stale]:
            found.append(f"Older scores: {', '.join(stale)} changed after the scores were made. Run step 8 again.")
        for split, row in self.last.items():
            reached, least, name = row["miou"], self.constant[split]["miou"], self.constant[split]["class"]
            if reached is not None and least is not None and reached <= least < 1:
                found.append(
                    f"No better than one class everywhere: {row['title']}, {split} split, has mIoU {percent(reached)}; "
                    f"calling every pixel {name} gives {percent(least)}."
                )
            missed = [
                f"{self.dataset.classes[k]} ({percent(row['truth_share'][k])} % of the truth)"
                for k in np.flatnonzero(self.dataset.scored)
                if row["truth_share"][k] > 0 and row["iou"][k] < MISSED
            ]
            if missed:
                found.append(
                    f"Not found: {row['title']}, {split} split, has an IoU below {percent(MISSED, 0)} % for "
                    f"{', '.join(missed)}."
                )
        found += [f"{name}: {sentence}" for name, run in self.runs.items() for sentence in run.warnings]
        return found + self.broken

    def content(self) -> Row:
        """What scores.json holds."""
        return {
            "dataset": self.dataset.name,
            "title": self.dataset.title,
            "experiment": self.experiment,
            "protocol": self.protocol,
            "classes": self.dataset.classes,
            "left_out_of_mean": self.dataset.left_out_of_mean,
            "paper": self.dataset.paper,
            "facts": self.facts,
            "warnings": self.warnings,
            "failures": self.failures,
            "most_frequent_class": self.constant,
            "stages": self.rows,
        }


def constant_map(matrix: ConfusionMatrix, scored: np.ndarray) -> tuple[int, ConfusionMatrix]:
    """The truth's most frequent class among the `scored` ones (K,), and the counts of a map of this class alone."""
    truth, constant = matrix.counts.sum(axis=1), ConfusionMatrix(matrix.num_classes)
    k = int(np.where(scored, truth, -1).argmax())
    constant.counts[:, k] = truth
    return k, constant


def plain(value: Any) -> Any:
    """For JSON: arrays to lists, NaN to None."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [plain(item) for item in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def percent(value: float | None, digits: int = 2) -> str:
    """0.6385 -> 63.85; a dash for a score that is not defined."""
    return "–" if value is None else f"{100 * value:.{digits}f}"
