"""What is known of an experiment: its runs, and the scores that follow from the counts of its label folders."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, model_validator

from report.stages import Stage
from tools.dataset import Dataset
from tools.runs import Run
from tools.scores import ConfusionMatrix

FACTS = {"seed": "seed", "backbone": "backbone", "weights": "weights", "protocol": "protocol of the steps"}
MISSED = 0.01  # IoU below which a class counts as not found
Row = dict[str, Any]


class ScoresFile(BaseModel):
    """What is read back of scores.json; its scores are computed again from the counts."""

    protocol: Literal["clean", "released"] = "clean"
    classes: list[str] = []
    stages: list[Stage] = []

    @model_validator(mode="after")
    def counts_fit_the_classes(self) -> Self:
        count = len(self.classes)
        for stage in self.stages:
            if len(stage.confusion) != count or any(len(row) != count + 1 for row in stage.confusion):
                raise ValueError(f"the counts of {stage.stage} do not fit the {count} classes")
        return self


@dataclass(frozen=True)
class Summary:
    """The runs of an experiment, as they are on disk, and the stages that step 8 has scored, from whose counts every
    score follows.
    """

    args: Any  # with dataset, experiment and root, for the commands that the page shows
    dataset: Dataset
    folder: Path
    runs: dict[str, Run]  # in the order of their start
    outdated: set[str]  # runs whose inputs have changed since
    broken: list[str]  # a sentence for each damaged run.json, scores.json, samples.json
    stages: list[Stage] = field(default_factory=list)
    protocol: str = "clean"
    failures: list[str] = field(default_factory=list)
    bound_runs: dict[str, Run] = field(default_factory=dict)  # of the fully supervised experiment

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def rows(self) -> list[Row]:
        """Each scored stage with its scores: fractions from 0 to 1, None where a score is not defined."""
        rows = [stage.model_dump() | self._scores(stage.matrix) for stage in self.stages]
        bounds = {}
        for row in rows:
            if row["is_bound"] and row["stage"].startswith("segmentation"):
                bounds[row["split"]] = row["miou"]
        for row in rows:
            bound = bounds.get(row["split"])
            row["share_of_supervised"] = row["miou"] / bound if bound and row["miou"] is not None else None
        return rows

    def _scores(self, matrix: ConfusionMatrix) -> Row:
        counts, with_all_classes = matrix.counts, matrix.scores()
        pixels = max(counts.sum(), 1)
        scores = matrix.scores(np.flatnonzero(~self.dataset.scored), self.protocol) | {
            "miou_all_classes": with_all_classes["miou"],
            "all_classes": with_all_classes,
            "truth_share": counts.sum(axis=1) / pixels,
            "predicted_share": counts.sum(axis=0)[:-1] / pixels,
        }
        return plain(scores)

    @cached_property
    def last(self) -> dict[str, Row]:
        """Split -> the last scored stage of this experiment."""
        return {row["split"]: row for row in self.rows if row["experiment"] == self.name}

    @cached_property
    def constant(self) -> dict[str, Row]:
        """Split -> the scores of a map that is the truth's most frequent class everywhere, which a result must beat."""
        rows: dict[str, Row] = {}
        for stage in self.stages:
            if stage.split in rows and stage.images <= rows[stage.split]["images"]:
                continue  # the same truth, of no more images
            k, matrix = constant_map(stage.matrix, self.dataset.scored)
            rows[stage.split] = self._scores(matrix) | {"class": self.dataset.classes[k], "images": stage.images}
        return rows

    @cached_property
    def class_titles(self) -> list[str]:
        """The names of the classes, which say what the mean leaves out."""
        remarks = dict.fromkeys(self.dataset.left_out_of_mean, " (left out of the mean)")
        return [name + remarks.get(name, "") for name in self.dataset.classes]

    def class_ious(self, row: Row) -> list[float | None]:
        """IoU of each class in one of `rows`; of a left-out class, its IoU with all classes counted."""
        return np.where(self.dataset.scored, row["iou"], row["all_classes"]["iou"]).tolist()

    @cached_property
    def facts(self) -> dict[str, list[str]]:
        """What the figures rest on: each constant of `FACTS` and each note of the steps, with all its values."""
        facts: dict[str, list[str]] = {}
        for run in self.runs.values():
            values = {title: run.constants[key] for key, title in FACTS.items() if key in run.constants}
            if "weights" in values:  # of a file, its name is enough
                values["weights"] = Path(str(values["weights"])).name
            values |= {key.replace("_", " "): value for key, value in run.notes.items()}
            for title, value in values.items():
                texts = map(str, value if isinstance(value, list) else [value])
                facts[title] = list(dict.fromkeys([*facts.get(title, []), *texts]))
        return facts

    @cached_property
    def warnings(self) -> list[str]:
        """What a reader must know before trusting a figure."""
        warnings = [f"A stand-in was used: {text}." for text in self.facts.get("stand in", [])]
        if "released" in (self.protocol, *self.facts.get(FACTS["protocol"], [])):
            warnings.append(
                "Released protocol: pixel truth was used where a weakly supervised method has none, or pixels "
                "predicted as a left-out class were dropped. The clean protocol is the fair one."
            )
        if partial := sum(stage.partial for stage in self.stages):
            warnings.append(f"Partial scores: {partial} of the label folders have missing or damaged files.")
        if stale := [stage.title for stage in self.stages if stage.stale]:
            warnings.append(f"Older scores: {', '.join(stale)} changed after the scores were made. Run step 8 again.")
        for row in self.last.values():
            warnings += self._warnings_of(row)
        for name, run in self.runs.items():
            warnings += [f"{name}: {sentence}" for sentence in run.warnings]
        return warnings + self.broken

    def _warnings_of(self, row: Row) -> list[str]:
        """Whether a result is no better than one class everywhere, and the classes that it does not find."""
        warnings, constant = [], self.constant[row["split"]]
        result = f"{row['title']}, {row['split']} split,"
        if row["miou"] is not None and constant["miou"] is not None and row["miou"] <= constant["miou"] < 1:
            warnings.append(
                f"No better than one class everywhere: {result} has mIoU {percent(row['miou'])}; calling every pixel "
                f"{constant['class']} gives {percent(constant['miou'])}."
            )
        missed = [
            f"{self.dataset.classes[k]} ({percent(row['truth_share'][k])} % of the truth)"
            for k in np.flatnonzero(self.dataset.scored)
            if row["truth_share"][k] > 0 and row["iou"][k] < MISSED
        ]
        if missed:
            warnings.append(f"Not found: {result} has an IoU below {percent(MISSED, 0)} % for {', '.join(missed)}.")
        return warnings

    def content(self) -> Row:
        """What scores.json holds."""
        return {
            "dataset": self.dataset.name,
            "title": self.dataset.title,
            "experiment": self.name,
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
    """The truth's most frequent class among the `scored` ones, (K,) bool, and the counts of a map that is it
    everywhere.
    """
    support = matrix.counts.sum(axis=1)
    k = int(np.where(scored, support, -1).argmax())
    counts = np.zeros_like(matrix.counts)
    counts[:, k] = support
    return k, ConfusionMatrix(matrix.num_classes, counts)


def plain(value: Any) -> Any:
    """For JSON: arrays to lists, NaN to None."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return [plain(item) for item in value.tolist()]
    return None if isinstance(value, float) and math.isnan(value) else value


def percent(value: float | None, digits: int = 2) -> str:
    """0.6385 -> 63.85; a dash for a score that is not defined."""
    return "–" if value is None or math.isnan(value) else f"{100 * value:.{digits}f}"
