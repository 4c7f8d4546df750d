"""The scores of a run for people and programs: what scores.json holds, and its tables as Markdown and csv."""

import csv
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tools.dataset import Dataset
from tools.files import write_whole
from tools.scores import ConfusionMatrix

STAGES = {  # step folder -> (title, the split it is meant for), in the order of the steps
    "cams": ("CAM, argmax", "train"),
    "pseudo_labels": ("pseudo-label", "train"),
    "refined_pseudo_labels": ("refined pseudo-label", "train"),
    "segmentation": ("segmentation", "test"),
    "refined_segmentation": ("refined segmentation", "test"),
}
MEASURES = ("miou", "share_of_supervised", "miou_all_classes", "mean_f1", "overall_accuracy", "kappa")
FACTS = {"seed": "seed", "backbone": "backbone", "weights": "weights", "protocol": "protocol of the steps"}


@dataclass
class Stage:
    """One label folder and, once scored, its counts.

    `per_image` maps the id to the mIoU of that image alone, `present` to how many classes of the mean its truth holds.
    """

    name: str
    title: str
    experiment: str
    split: str
    folder: Path
    run: dict
    matrix: ConfusionMatrix
    per_image: dict[str, float] = field(default_factory=dict)
    present: dict[str, int] = field(default_factory=dict)
    partial: bool = False


def summarise(
    dataset: Dataset,
    stages: list[Stage],
    runs: dict[str, dict],
    failures: list[str],
    experiment: str,
    supervised: str,
    protocol: str,
) -> dict:
    """What scores.json holds: the scores of each stage as fractions (null: not defined), and what they rest on."""
    left_out = np.flatnonzero(~dataset.scored)
    rows = []
    for stage in stages:
        every, headline = stage.matrix.scores(), stage.matrix.scores(left_out, protocol)
        row = {
            "experiment": stage.experiment,
            "stage": stage.name,
            "title": stage.title,
            "split": stage.split,
            "images": len(stage.per_image),
            "partial": stage.partial,
            "made": made(stage.run),
            "stale": False,
            "is_bound": stage.experiment == supervised,
            "miou_all_classes": every["miou"],
            "share_of_supervised": None,
        }
        rows.append(row | headline | {"all_classes": every, "confusion": stage.matrix.counts})
    for row in rows:
        bounds = [
            other["miou"]
            for other in rows
            if other["is_bound"]
            and other["split"] == row["split"]
            and other["stage"].startswith("segmentation")
            and other["miou"] > 0
        ]
        row["share_of_supervised"] = row["miou"] / bounds[0] if bounds else None
    known = facts(runs)
    return plain(
        {
            "dataset": dataset.name,
            "title": dataset.title,
            "experiment": experiment,
            "protocol": protocol,
            "classes": dataset.classes,
            "left_out_of_mean": dataset.left_out_of_mean,
            "paper": dataset.paper,
            "facts": known,
            "warnings": warnings(known, protocol, rows),
            "failures": failures,
            "stages": rows,
        }
    )


def made(run: dict) -> list:
    """What tells one making of a step's folder from another: when it started and how many files it holds."""
    return [run.get("started"), run.get("files")]


def facts(runs: dict[str, dict]) -> dict[str, list[str]]:
    """What the figures rest on: each constant of `FACTS` and each note of the steps with all values it has."""
    found: dict[str, list[str]] = {}
    for run in runs.values():
        constants = {title: run["constants"][key] for key, title in FACTS.items() if key in run.get("constants", {})}
        for title, value in (constants | {key.replace("_", " "): v for key, v in run.get("notes", {}).items()}).items():
            for text in map(str, value if isinstance(value, list) else [value]):
                found.setdefault(title, [])
                found[title] += [text] * (text not in found[title])
    return found


def warnings(facts: dict[str, list[str]], protocol: str, rows: list[dict]) -> list[str]:
    """What a reader must know before believing a figure; a row of scores is `stale` when its folder has changed."""
    found = [f"A stand-in was used: {text}." for text in facts.get("stand in", [])]
    if protocol == "released" or "released" in facts.get(FACTS["protocol"], []):
        found.append(
            "Released protocol: pixel truth was used where a weakly supervised method has none, or pixels "
            "predicted as a left-out class were dropped. The clean protocol is the fair one."
        )
    if partial := sum(row["partial"] for row in rows):
        found.append(f"Partial scores: {partial} of the label folders lack images or hold damaged ones.")
    if stale := [row["title"] for row in rows if row["stale"]]:
        found.append(f"Older scores: {', '.join(stale)} changed after they were scored; run step 8 again.")
    return found


def plain(value):
    """For JSON: arrays to lists, NaN to None."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [plain(item) for item in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def percent(value: float | None) -> str:
    """0.6385 -> 63.85; a score that is not defined is a dash."""
    return "–" if value is None else f"{100 * value:.2f}"


def table(summary: dict) -> tuple[list[str], list[list[str]]]:
    """The main table: column titles, and one row of texts for each stage; the paper's figures stand at the last."""
    paper = summary["paper"]
    titles = [
        "stage",
        "split",
        "mIoU",
        "share of supervised",
        *(["paper: mIoU", "paper: share"] if paper else []),
        f"mIoU, all {len(summary['classes'])} classes",
        "mean F1",
        "overall accuracy",
        "kappa",
        "images",
    ]
    own = [row for row in summary["stages"] if row["split"] == "test" and not row["is_bound"]]
    rows = []
    for row in summary["stages"]:
        published = ["not published"] * 2
        if own and row is own[-1] and paper:
            published = [f"{paper['miou']:.2f}", f"{paper['share_of_supervised']:.2f}"]
        elif row["is_bound"] and row["split"] == "test" and paper:
            published = [f"{paper['supervised']:.2f} (implied)", "100"]
        notes = [word for word, holds in (("partial", row["partial"]), ("older", row["stale"])) if holds]
        values = [percent(row[key]) for key in MEASURES]
        rows.append(
            [
                row["title"] + (f" ({', '.join(notes)})" if notes else ""),
                row["split"],
                *values[:2],
                *(published if paper else []),
                *values[2:],
                str(row["images"]),
            ]
        )
    return titles, rows


def per_class(summary: dict) -> tuple[list[str], list[list[str]]]:
    """IoU of every class: column titles, and a row for each class. A left-out class shows its IoU with all counted."""
    rows = []
    for k, name in enumerate(summary["classes"]):
        left_out = name in summary["left_out_of_mean"]
        values = [(row["all_classes"] if left_out else row)["iou"][k] for row in summary["stages"]]
        rows.append([name + (" (left out of the mean)" if left_out else ""), *map(percent, values)])
    return ["IoU", *(f"{row['title']}, {row['split']}" for row in summary["stages"])], rows


def lines(summary: dict) -> list[str]:
    """What stands under the table: protocol, classes in the mean, what the paper gives, seed, backbone, stand-ins."""
    scored = len(summary["classes"]) - len(summary["left_out_of_mean"])
    left_out = f"; left out: {', '.join(summary['left_out_of_mean'])}" if summary["left_out_of_mean"] else ""
    made = "; ".join(f"{title}: {', '.join(values)}" for title, values in summary["facts"].items())
    return [
        f"Protocol of the scores: {summary['protocol']}. mIoU and mean F1 over {scored} classes{left_out}. All in "
        "per cent.",
        *([] if summary["paper"] else ["The paper gives no figure for this data set."]),
        f"Made with {made}." if made else "How it was made is not recorded.",
        *summary["warnings"],
    ]


def markdown(summary: dict) -> str:
    """Both tables and the lines that say what they rest on."""
    parts = [f"{summary['title']}, experiment {summary['experiment']}"]
    for texts, (titles, rows) in ((2, table(summary)), (1, per_class(summary))):
        cells = [[text.replace("|", "\\|") for text in row] for row in [titles, *rows]]
        ruled = [cells[0], ["---" if column < texts else "---:" for column in range(len(titles))], *cells[1:]]
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in ruled))
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in lines(summary))])


def write_csv(path: Path, summary: dict) -> None:
    """One row for each stage, fractions from 0 to 1; an undefined score is empty."""
    single = ("experiment", "stage", "split", "images", "partial", *MEASURES)
    several = ("iou", "f1", "precision", "recall", "support")
    with write_whole(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*single, *(f"{score}_{name}" for score in several for name in summary["classes"])])
        for row in summary["stages"]:
            writer.writerow([*(row[key] for key in single), *(value for score in several for value in row[score])])
