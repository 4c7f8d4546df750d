"""The account of a run for people: the score table as Markdown and csv, and report.html, a page that needs no network.

Data is prepared here; how the page looks is in report.html.j2, which escapes every name.
"""

import base64
import csv
import io
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from tools.dataset import Dataset
from tools.folders import ROOT, write_whole
from tools.scores import ConfusionMatrix

RIGHT_WRONG = np.array([[235, 235, 235], [190, 60, 0]], np.uint8)  # apart in brightness too
SIDE = 256  # pixels of a picture in the page
MOST_BYTES = 4_000_000  # of pictures in the page, so that it stays below 5 MB
NOT_CURVES = {"epoch", "step", "steps", "lr", "learning_rate", "images_per_second", "seconds", "time"}
MEASURES = ("miou", "miou_all_classes", "mean_f1", "overall_accuracy", "kappa", "share_of_supervised")
FACTS = {"seed": "seed", "backbone": "backbone", "weights": "weights", "protocol": "protocol of the steps"}


@dataclass
class Stage:
    """One label folder and, once scored, its counts. `per_image` maps the id to the mIoU of that image alone."""

    name: str
    title: str
    experiment: str
    split: str
    folder: Path
    run: dict
    matrix: ConfusionMatrix
    per_image: dict[str, float] = field(default_factory=dict)
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
    of_the_paper = bool(dataset.paper) and (ROOT / "datasetsprocess" / f"{dataset.name}.toml").exists()
    known = facts(runs)
    return plain(
        {
            "dataset": dataset.name,
            "title": dataset.title,
            "experiment": experiment,
            "protocol": protocol,
            "classes": dataset.classes,
            "left_out_of_mean": dataset.left_out_of_mean,
            "paper": dataset.paper if of_the_paper else {},
            "facts": known,
            "warnings": warnings(known, protocol, sum(stage.partial for stage in stages)),
            "failures": failures,
            "stages": rows,
        }
    )


def accounts(folder: Path, *more: Path) -> dict[str, dict]:
    """Step -> run.json, of every step under `folder` and of the folders `more`; damaged ones are left out."""
    runs = {}
    files = {file.parent.name: file for file in folder.glob("*/run.json")}
    files |= {f"{path.name}, {path.parent.name} split": path / "run.json" for path in more}
    for name, file in files.items():
        try:
            runs[name] = dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            continue
    return dict(sorted(runs.items(), key=lambda item: item[1].get("started", "")))


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


def warnings(facts: dict[str, list[str]], protocol: str, partial: int) -> list[str]:
    """What a reader must know before believing a figure."""
    found = [f"A stand-in was used: {text}." for text in facts.get("stand in", [])]
    if protocol == "released" or "released" in facts.get(FACTS["protocol"], []):
        found.append(
            "Released protocol: pixel truth was used where a weakly supervised method has none, or pixels "
            "predicted as a left-out class were dropped. The clean protocol is the fair one."
        )
    if partial:
        found.append(f"Partial scores: {partial} of the label folders lack images or hold damaged ones.")
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
    return "–" if value is None else f"{100 * value:.2f}"


def table(summary: dict) -> tuple[list[str], list[list[str]]]:
    """The main table: column titles, and one row of texts for each stage; the paper's figures stand at the last."""
    titles = [
        "stage",
        "split",
        "mIoU",
        f"mIoU, all {len(summary['classes'])} classes",
        "mean F1",
        "overall accuracy",
        "kappa",
        "share of supervised",
        "paper: mIoU",
        "paper: share",
        "images",
    ]
    own = [row for row in summary["stages"] if row["split"] == "test" and not row["is_bound"]]
    rows = []
    for row in summary["stages"]:
        paper = ("not published", "not published")
        if own and row is own[-1] and summary["paper"]:
            paper = (f"{summary['paper']['miou']:.2f}", f"{summary['paper']['share_of_supervised']:.2f}")
        elif row["is_bound"] and row["split"] == "test" and summary["paper"]:
            paper = (f"{summary['paper']['supervised']:.2f} (implied)", "100")
        rows.append(
            [
                row["title"] + (" (partial)" if row["partial"] else ""),
                row["split"],
                *(percent(row[key]) for key in MEASURES),
                *paper,
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
    """What stands under the table: protocol, classes in the mean, seed, backbone, stand-ins."""
    scored = len(summary["classes"]) - len(summary["left_out_of_mean"])
    left_out = f"; left out: {', '.join(summary['left_out_of_mean'])}" if summary["left_out_of_mean"] else ""
    made = "; ".join(f"{title}: {', '.join(values)}" for title, values in summary["facts"].items())
    return [
        f"Protocol of the scores: {summary['protocol']}. mIoU and mean F1 over {scored} classes{left_out}. All in "
        "per cent.",
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
    single = (
        "experiment",
        "stage",
        "split",
        "images",
        "partial",
        *MEASURES,
    )
    several = ("iou", "f1", "precision", "recall", "support")
    with write_whole(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*single, *(f"{score}_{name}" for score in several for name in summary["classes"])])
        for row in summary["stages"]:
            writer.writerow([*(row[key] for key in single), *(value for score in several for value in row[score])])


def choose(scores: dict[str, float], n: int) -> list[tuple[str, str]]:
    """(kind, id) of the `n` best, median and worst images; an image without a score is never chosen."""
    ids = sorted((id for id in scores if math.isfinite(scores[id])), key=lambda id: (-scores[id], id))
    n = min(n, math.ceil(len(ids) / 3))
    middle = (len(ids) - n) // 2
    chosen = [("best", ids[:n]), ("median", ids[middle : middle + n]), ("worst", ids[len(ids) - n :])]
    kinds = {id: kind for kind, group in chosen for id in group}  # with very few images one may be of two kinds
    return [(kinds[id], id) for id in ids if id in kinds]


def sample(id: str, split: str, kind: str, score: float, pictures: dict[str, np.ndarray]) -> dict:
    """One patch for the page: its pictures title -> (H,W,3) uint8 as data URIs."""
    return {
        "id": id,
        "split": split,
        "kind": kind,
        "score": percent(score),
        "panels": [{"title": title, "source": data_uri(picture)} for title, picture in pictures.items()],
    }


def data_uri(picture: np.ndarray) -> str:
    """Flat colours as PNG, exactly; photographs and maps as JPEG; both at most `SIDE` pixels large."""
    image = Image.fromarray(np.ascontiguousarray(picture))
    flat = image.getcolors(256) is not None
    scale = SIDE / max(image.size)
    if scale < 1:
        size = [max(1, round(length * scale)) for length in image.size]
        image = image.resize(size, Image.Resampling.NEAREST if flat else Image.Resampling.BOX)
    file = io.BytesIO()
    image.save(file, **({"format": "PNG", "optimize": True} if flat else {"format": "JPEG", "quality": 80}))
    return f"data:image/{'png' if flat else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"


def curves(folder: Path) -> list[dict]:
    """The loss curves in the log.jsonl of every training under `folder`, each field on its own."""
    found = []
    for file in sorted(folder.glob("*/log.jsonl")):
        epochs = []
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # the line that was being written when the run was stopped
                continue
            epochs += [entry] if isinstance(entry, dict) else []
        names = dict.fromkeys(
            name
            for entry in epochs
            for name, value in entry.items()
            if name not in NOT_CURVES and isinstance(value, int | float)
        )
        for name in names:
            points = [
                (entry.get("epoch", number), entry[name])
                for number, entry in enumerate(epochs, 1)
                if isinstance(entry.get(name), int | float) and math.isfinite(entry[name])
            ]
            if points:
                low, high = min(value for _, value in points), max(value for _, value in points)
                found.append({"training": file.parent.name, "name": name, "points": points, "low": low, "high": high})
    return found


def write_report(
    path: Path, dataset: Dataset, summary: dict, runs: dict[str, dict], curves: list[dict], samples: list[dict]
) -> None:
    """Write report.html; samples beyond `MOST_BYTES` are left out, the last ones first."""
    size, kept = 0, []
    for each in samples:
        size += sum(len(panel["source"]) for panel in each["panels"])
        kept += [each] if size <= MOST_BYTES else []
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["percent"] = percent
    last = {row["split"]: row for row in summary["stages"] if row["experiment"] == summary["experiment"]}
    page = environment.get_template("report.html.j2").render(
        summary=summary,
        table=table(summary),
        per_class=per_class(summary),
        lines=lines(summary),
        runs=runs,
        curves=curves,
        samples=kept,
        left_out=len(samples) - len(kept),
        confusions=list(last.values()),
        legend=[(name, colour.tolist()) for name, colour in zip(dataset.classes, dataset.colours, strict=True)],
    )
    with write_whole(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
