"""report.html, the account of a run that opens in any browser and needs no network.

evaluate_miou.py writes it with the scores, the truth and the errors; every other step renews it with what can be shown
without the truth. Data is prepared here; how the page looks is in page.html.j2, which escapes every name.
"""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from report.patch_pictures import ERRORS, panels, sample
from report.score_tables import STAGES, Stage, facts, lines, made, per_class, percent, summarise, table, warnings
from tools.dataset import SPLITS, Dataset
from tools.files import write_whole
from tools.pictures import sample_ids
from tools.scores import ConfusionMatrix
from tools.step import MADE_BY, StepFolder

MOST_BYTES = 4_000_000  # of pictures in the page, so that it stays below 5 MB
UNSCORED_SAMPLES = 3  # patches of each split that are shown before there are scores to choose them by
NOT_CURVES = {"epoch", "step", "steps", "lr", "learning_rate", "images_per_second", "seconds", "time"}
TITLES = {"classifier": "classifier", "segmenter": "segmenter"} | {name: title for name, (title, _) in STAGES.items()}


def refresh(step: StepFolder, dataset: Dataset, load_masks: Callable) -> None:
    """Renew scores/report.html beside a finished step. No pixel label is opened.

    Scores and samples of an earlier evaluate_miou.py stay while the folders that they were taken from are unchanged;
    after that the scores are marked as older, and the samples are drawn anew without the truth. `load_masks` reads a
    mask file. Whatever goes wrong here is told in one line: the step's own results are whole.
    """
    if step.process:
        return
    folder, name = step.folder.parent, step.folder.name
    try:
        summary = _read(folder / "scores" / "scores.json")
        runs = accounts(folder, dataset)
        if summary.get("classes") != list(dataset.classes):
            summary = summarise(dataset, [], runs, [], folder.name, "", "clean")
        for row in summary["stages"]:
            run = _read(folder.parent / row["experiment"] / row["stage"] / "run.json")
            row["stale"] = row.get("made") != made(run) or (
                row["experiment"] == folder.name and outdated(row["stage"], runs)
            )
        summary["facts"] = facts(runs)
        summary["warnings"] = warnings(summary["facts"], summary["protocol"], summary["stages"])
        kept = _read(folder / "scores" / "samples.json")
        samples = [each for split in SPLITS for each in _samples(folder, dataset, split, summary, kept, load_masks)]
        write_report(folder, dataset, summary, runs, samples)
    except Exception as error:  # a page must never cost the hours of a training
        print(f"{name} is done, but its report could not be renewed ({type(error).__name__}: {error})", file=sys.stderr)


def _read(file: Path) -> dict:
    """A JSON file; {} when it is missing or damaged."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _samples(folder: Path, dataset: Dataset, split: str, summary: dict, kept: dict, load_masks: Callable) -> list[dict]:
    """The samples of the last evaluation where they still hold, else some patches with what the steps have made."""
    stages = []
    for stage, (title, usual) in STAGES.items():
        name = stage if split == usual else f"{stage}_{split}"
        run = _read(folder / name / "run.json")
        if run.get("finished"):
            matrix = ConfusionMatrix(dataset.num_classes)
            stages.append(Stage(name, title, folder.name, split, folder / name, run, matrix))
    rows = [row for row in summary["stages"] if row["split"] == split]
    scored = {row["stage"] for row in rows if row["experiment"] == folder.name}
    if rows and scored == {stage.name for stage in stages} and not any(row["stale"] for row in rows):
        return kept.get(split, [])
    if not stages:
        return []
    return [
        sample(id, split, "sample", None, panels(dataset, split, id, stages, load_masks, with_maps=True))
        for id in sample_ids(dataset.ids(split), UNSCORED_SAMPLES)
    ]


def accounts(folder: Path, dataset: Dataset) -> dict[str, dict]:
    """Step -> run.json, in the order of their start: every step under `folder`, and step 9 where they rest on it."""
    runs = {file.parent.name: run for file in folder.glob("*/run.json") if (run := _read(file))}
    if any("sam_masks" in run.get("inputs", {}) for run in runs.values()):
        masks = {f"sam_masks, {split} split": _read(dataset.sam_masks(split) / "run.json") for split in SPLITS}
        runs |= {name: run for name, run in masks.items() if run}
    return dict(sorted(runs.items(), key=lambda item: item[1].get("started", "")))


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


def outdated(name: str, runs: dict[str, dict]) -> bool:
    """Whether a step that `name` was made from, at any distance, has been made anew since."""
    present = {run.get("started"): other for other, run in runs.items()}
    run = runs.get(name, {})
    for source, started in run.get("inputs", {}).items():
        if run.get("constants", {}).get(source):
            continue  # taken from another experiment, by a constant of that name
        if started in present:
            if outdated(present[started], runs):
                return True
        elif any(other.startswith(source) for other in runs):
            return True
    return False


def cards(summary: dict, runs: dict[str, dict]) -> list[dict]:
    """The run at a glance, a card for each step and each scored folder: title, score (or None), notes, whether done."""
    own = {row["stage"]: row for row in summary["stages"] if row["experiment"] == summary["experiment"]}
    supervised = "supervision" in summary["facts"]  # such a run has no pseudo-labels
    found = []
    for name in (name for name in MADE_BY if name in TITLES and (name in runs or not supervised)):
        run, notes = runs.get(name, {}), []
        if not run:
            notes.append(f"not made yet: {MADE_BY[name].split(',')[0]}")
        elif not run.get("finished"):
            notes.append("not finished: the same command continues it")
        elif outdated(name, runs):
            notes.append("made from an earlier run: --overwrite makes it anew")
        found.append(_card(TITLES[name], own.get(name), notes, run.get("seconds")))
    others = [row for row in summary["stages"] if row is not own.get(row["stage"]) or row["stage"] not in TITLES]
    return found + [_card(row["title"], row, []) for row in others]


def _card(title: str, row: dict | None, notes: list[str], seconds: float | None = None) -> dict:
    done = not notes
    if row:
        words = ("partial", row["partial"]), ("an older score", row["stale"])
        notes = [
            ", ".join([f"{row['split']} split", f"{row['images']} images", *(word for word, holds in words if holds)]),
            *notes,
        ]
    return {
        "title": title,
        "score": row and percent(row["miou"]),
        "notes": [*notes, *([duration(seconds)] if seconds else [])],
        "done": done,
    }


def write_report(folder: Path, dataset: Dataset, summary: dict, runs: dict[str, dict], samples: list[dict]) -> None:
    """Write <folder>/scores/report.html; samples beyond `MOST_BYTES` are left out, the last ones first."""
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
    last = {row["split"]: row for row in summary["stages"] if row["experiment"] == summary["experiment"]}
    legend = list(zip(dataset.classes, dataset.colours.tolist(), strict=True))
    page = environment.get_template("page.html.j2").render(
        summary=summary,
        cards=cards(summary, runs),
        table=table(summary),
        per_class=per_class(summary),
        lines=lines(summary),
        runs=runs,
        curves=curves(folder),
        samples=kept,
        left_out=len(samples) - len(kept),
        confusions=list(last.values()),
        legend=legend,
        names={  # what the colours of a picture mean, for the words under the pointer
            "classes": {str(colour): name for name, colour in [("ignored", ERRORS["not counted"]), *legend]},
            "errors": {str(colour): name for name, colour in ERRORS.items()},
        },
    )
    with write_whole(folder / "scores" / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


def duration(seconds: float) -> str:
    """4 s, 3 min, 2.1 h"""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
