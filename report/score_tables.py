"""The scores of an experiment for people and programs: what scores.json holds, and its tables as Markdown and csv."""

import csv
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, Field, model_validator

from report.label_folders import LabelFolder, Split
from tools.dataset import Dataset
from tools.files import write_json, write_whole
from tools.runs import Run
from tools.scores import ConfusionMatrix

MEASURES = ("miou", "share_of_supervised", "miou_all_classes", "mean_f1", "overall_accuracy", "kappa")
FACTS = {"seed": "seed", "backbone": "backbone", "weights": "weights", "protocol": "protocol of the steps"}
Pixels = Annotated[int, Field(ge=0, le=10**15)]
Row = dict[str, Any]
Texts = tuple[list[str], list[list[str]]]  # a table: column titles, rows


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

    constants: Any  # with dataset, experiment and root, for the commands that the page shows
    dataset: Dataset
    folder: Path  # of the experiment
    runs: dict[str, Run]  # in the order of their start
    outdated: set[str]  # runs whose inputs have changed since
    broken: list[str]  # a sentence for each damaged run.json, scores.json, samples.json
    protocol: str = "clean"
    stages: list[Scored] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

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


def table(summary: Summary) -> Texts:
    """The main table: one row for each folder; the paper's figures stand at the last one and at the bound."""
    paper, every = summary.dataset.paper, len(summary.dataset.left_out_of_mean) > 0
    titles = [
        "stage",
        "split",
        "mIoU",
        "share of supervised",
        *(["paper: mIoU", "paper: share"] if paper else []),
        *([f"mIoU, all {summary.dataset.num_classes} classes"] if every else []),
        "mean F1",
        "overall accuracy",
        "kappa",
        "images",
    ]

    def texts(title: str, split: str, row: Row, published: list[str]) -> list[str]:
        values = [percent(row.get(key)) for key in MEASURES if every or key != "miou_all_classes"]
        return [title, split, *values[:2], *(published if paper else []), *values[2:], str(row["images"])]

    tested = [row for row in summary.rows if row["split"] == "test" and not row["is_bound"]]
    rows = []
    for row in summary.rows:
        published = ["not published"] * 2
        if paper and tested and row is tested[-1]:
            published = [f"{paper['miou']:.2f}", f"{paper['share_of_supervised']:.2f}"]
        elif paper and row["is_bound"] and row["split"] == "test":
            published = [f"{paper['supervised']:.2f} (implied)", "100"]
        notes = [word for word, holds in (("partial", row["partial"]), ("older", row["stale"])) if holds]
        title = row["title"] + (f" ({', '.join(notes)})" if notes else "")
        rows.append(texts(title, row["split"], row, published))
    for split, row in summary.constant.items():
        rows.append(texts(f"every pixel {row['class']}, the most frequent class", split, row, ["–", "–"]))
    return titles, rows


def per_class(summary: Summary) -> Texts:
    """IoU of every class, a row for each class. A left-out class shows its IoU with all classes counted."""
    rows = []
    for k, name in enumerate(summary.dataset.classes):
        left_out = name in summary.dataset.left_out_of_mean
        values = [(row["all_classes"] if left_out else row)["iou"][k] for row in summary.rows]
        rows.append([name + (" (left out of the mean)" if left_out else ""), *map(percent, values)])
    return ["IoU", *(f"{row['title']}, {row['split']}" for row in summary.rows)], rows


def shares(summary: Summary) -> Texts:
    """Share of each class of the labelled pixels, in the truth and in the last folder of each split."""
    last = summary.last.values()
    titles = [name for row in last for name in (f"truth, {row['split']}", f"{row['title']}, {row['split']}")]
    columns = [column for row in last for column in (row["truth_share"], row["predicted_share"])]
    rows = [[name, *(percent(column[k]) for column in columns)] for k, name in enumerate(summary.dataset.classes)]
    return ["share of pixels", *titles], rows


def lines(summary: Summary) -> list[str]:
    """What stands under the table: protocol, classes in the mean, what the paper gives, seed, backbone, stand-ins."""
    left_out = summary.dataset.left_out_of_mean
    without = f"; left out: {', '.join(left_out)}" if left_out else ""
    made = "; ".join(f"{title}: {', '.join(values)}" for title, values in summary.facts.items())
    return [
        f"Protocol of the scores: {summary.protocol}. mIoU and mean F1 over "
        f"{summary.dataset.num_classes - len(left_out)} classes{without}. All in per cent.",
        *([] if summary.dataset.paper else ["The paper gives no figure for this data set."]),
        f"Made with {made}." if made else "How it was made is not recorded.",
    ]


def markdown(summary: Summary) -> str:
    """The tables, and the lines that say what they rest on."""
    parts = [f"{summary.dataset.title}, experiment {summary.experiment}"]
    for texts, (titles, rows) in ((2, table(summary)), (1, per_class(summary)), (1, shares(summary))):
        cells = [[text.replace("|", "\\|") for text in row] for row in [titles, *rows]]
        ruled = [cells[0], ["---" if column < texts else "---:" for column in range(len(titles))], *cells[1:]]
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in ruled))
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in [*lines(summary), *summary.warnings])])


def write_scores(folder: Path, summary: Summary) -> None:
    """Write scores.json, scores.md and scores.csv (a row for each label folder; an undefined score is empty)."""
    write_json(folder / "scores.json", summary.content())
    with write_whole(folder / "scores.md") as temporary:
        temporary.write_text(markdown(summary) + "\n", encoding="utf-8")
    single = ("experiment", "stage", "split", "images", "partial", *MEASURES)
    several = ("iou", "f1", "precision", "recall", "support", "truth_share", "predicted_share")
    with write_whole(folder / "scores.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*single, *(f"{score}_{name}" for score in several for name in summary.dataset.classes)])
        for row in summary.rows:
            writer.writerow([*(row[key] for key in single), *(value for score in several for value in row[score])])
