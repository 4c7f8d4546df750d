"""report.html, the account of an experiment: one file that opens in any browser without a network.

evaluate_miou.py writes it with the scores, the truth and the errors; every other step renews it with what can be shown
without the truth. The data is prepared here; page.html.j2 lays it out and escapes every name.
"""

import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from report.label_folders import LabelFolder
from report.patch_pictures import ERRORS, Sample, SamplesFile, pack, panels
from report.score_tables import Texts, lines, per_class, shares, table
from report.summary import Row, Scored, ScoresFile, Summary, made, percent
from tools.command import UserError
from tools.dataset import Dataset, load_dataset
from tools.files import Model, read_json, write_whole
from tools.logs import read_log
from tools.pages import page_template
from tools.pictures import sample_ids
from tools.runs import Run
from tools.scores import ConfusionMatrix
from tools.step import experiment_folder
from tools.steps import LABEL_STEPS, SPLITS, STEPS, command_line, next_step

MOST_BYTES = 4_800_000  # of the page: samples beyond this size are left out
MOST_CLASSES = 60  # of a confusion matrix in the page
UNSCORED_SAMPLES = 3  # patches of each split that are shown before there are scores to choose them by
NOT_CURVES = {"epoch", "step", "steps", "lr", "learning_rate", "images_per_second", "seconds", "time"}
Points = list[tuple[int, float]]
Missing = TypeVar("Missing")


def renew(args: Any) -> None:
    """Draw scores/report.html again from what is on disk, after a step. No pixel label is opened.

    Scores and samples of the last evaluate_miou.py stay while the folders that they were made from are unchanged; after
    that the scores are marked as older, and the samples are drawn again without the truth. Any fault is one line on
    stderr: a page must never cost the hours of a training.
    """
    try:
        dataset = load_dataset(args.dataset, args.root)
        summary = read_experiment(args, dataset)
        scores = _read_back(summary.folder / "scores" / "scores.json", ScoresFile, ScoresFile(), summary.broken)
        kept = _read_back(summary.folder / "scores" / "samples.json", SamplesFile, SamplesFile({}), summary.broken)
        if scores.classes == list(dataset.classes):
            stages = [stage.model_copy(update={"stale": _is_stale(stage, summary)}) for stage in scores.stages]
            summary = replace(summary, stages=stages, protocol=scores.protocol)
        write_report(summary, [each for split in SPLITS for each in _samples(summary, split, kept)])
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"the step is done, but its report could not be renewed ({reason})", file=sys.stderr)


def read_experiment(args: Any, dataset: Dataset) -> Summary:
    """The runs of every step of the experiment, and of step 9 where one of them reads its masks."""
    folder = experiment_folder(args.root, args.dataset, args.experiment)
    runs: dict[str, Run] = {}
    broken: list[str] = []
    places = {file.parent.name: file.parent for file in sorted(folder.glob("*/run.json"))}
    places |= {f"sam_masks, {split} split": dataset.sam_masks(split) for split in SPLITS}
    for name, place in places.items():
        if not name.startswith("sam_masks") or any("sam_masks" in run.inputs for run in runs.values()):
            run = _read_back(place / "run.json", Run, None, broken)
            runs |= {name: run} if run else {}
    runs = dict(sorted(runs.items(), key=lambda item: item[1].started))
    labels = {dataset.image_labels_hash(split) for split in SPLITS if dataset.image_labels_file(split).exists()}
    return Summary(args, dataset, folder, runs, outdated_runs(runs, labels), broken)


def _read_back(file: Path, model: type[Model], missing: Missing, broken: list[str]) -> Model | Missing:
    """The content of a JSON file; `missing` where there is none, or where it is damaged, which goes to `broken`."""
    try:
        return read_json(file, model, "run its step again with --overwrite")
    except FileNotFoundError:
        return missing
    except UserError as error:
        broken.append(str(error))
        return missing


def outdated_runs(runs: dict[str, Run], labels: set[str]) -> set[str]:
    """The runs with an input that has changed since, at any distance.

    `runs` in the order of their start, so that inputs come first; `labels`: the hashes of image_labels.csv.
    """
    present = {run.started: name for name, run in runs.items()} | dict.fromkeys(labels, "image_labels")
    found: set[str] = set()
    for name, run in runs.items():
        for source, started in run.inputs.items():
            if run.constants.get(source):
                continue  # the input of another experiment, which this constant names
            known = source == "image_labels" or any(other.startswith(source) for other in runs)
            if present.get(started) in found or (known and started not in present):
                found.add(name)
    return found


def _is_stale(stage: Scored, summary: Summary) -> bool:
    """Whether a scored folder has changed since, or an input of it."""
    own = stage.experiment == summary.experiment
    run = summary.runs.get(stage.stage)
    if not own:
        run = _read_back(summary.folder.parent / stage.experiment / stage.stage / "run.json", Run, None, summary.broken)
    return run is None or made(run) != stage.made or (own and stage.stage in summary.outdated)


def _samples(summary: Summary, split: str, kept: SamplesFile) -> Sequence[Sample]:
    """The samples of the last evaluation where they still hold, else some patches with the results of the steps."""
    dataset, folders = summary.dataset, []
    for step in LABEL_STEPS.values():
        run = summary.runs.get(step.folder_of(split))
        if run and run.finished:
            path = summary.folder / step.folder_of(split)
            folders.append(LabelFolder(path, split, run, ConfusionMatrix(dataset.num_classes)))
    stages = [stage for stage in summary.stages if stage.split == split]
    scored = {stage.stage for stage in stages if stage.experiment == summary.experiment}
    if stages and scored == {each.path.name for each in folders} and not any(stage.stale for stage in stages):
        return kept.root.get(split, [])
    found = []
    for id in sample_ids(dataset.ids(split), UNSCORED_SAMPLES) if folders else ():
        with suppress(UserError):  # steps report the files that they cannot read
            pictures = pack(panels(dataset, id, folders, with_maps=True))
            result = folders[-1].title
            found.append(Sample(id=id, split=split, kind="sample", score=None, panels=pictures, result=result))
    return found


def label_review(summary: Summary) -> tuple[Texts, Texts] | None:
    """What the classifier says of the image-level labels: a table of the classes, one of the labels to check."""
    cams = summary.runs.get("cams")
    if not (cams and cams.finished and summary.dataset.image_labels_file("train").exists()):
        return None
    from tools.review import review  # imports torch

    try:
        found = review(summary.dataset, summary.folder / "cams")
    except UserError:  # steps report the files that they cannot read
        return None
    classes = [
        [name, str(count), percent(None if math.isnan(value) else value)] for name, count, value in found.classes
    ]
    says = {True: "present", False: "absent"}
    doubts = [[each.id, each.name, says[each.labelled], percent(each.probability)] for each in found.doubts]
    return (
        (["class", "patches with it", "average precision"], classes),
        (["patch", "class", "label", "probability"], doubts),
    )


def curves(folder: Path) -> list[dict[str, Any]]:
    """The curves in the log.jsonl of each training: one group for its losses, one for each entry with parts (classes).

    The curves of an entry with parts share their axis, from 0 to 1 where all values lie there.
    """
    groups: dict[tuple[str, bool], dict[str, Points]] = {}
    for file in sorted(folder.glob("*/log.jsonl")):
        for entry in read_log(file):
            for name, value in entry.items():
                nested = isinstance(value, dict)
                title = f"{file.parent.name}: {name.replace('_', ' ')}" if nested else file.parent.name
                for part, number in (value if nested else {name: value}).items():
                    wanted = nested or name not in NOT_CURVES
                    if wanted and isinstance(number, int | float) and abs(number) < 1e300:  # not NaN either
                        points = groups.setdefault((title, nested), {}).setdefault(part, [])
                        points.append((entry["epoch"], number))
    found = []
    for (title, nested), parts in groups.items():
        every = [value for points in parts.values() for _, value in points]
        if nested and min(every) >= 0 and max(every) <= 1:
            every = [0, 1]
        lines = []
        for name, points in parts.items():
            values = every if nested else [value for _, value in points]
            lines.append({"name": name, "points": points, "low": min(values), "high": max(values)})
        found.append({"title": title, "curves": lines})
    return found


def cards(summary: Summary) -> list[dict[str, Any]]:
    """The run at a glance, a card for each step and each scored folder: title, score (or None), notes, whether done."""
    own = {row["stage"]: row for row in summary.rows if row["experiment"] == summary.experiment}
    supervised = "supervision" in summary.facts  # such a run has no pseudo-labels
    found, shown = [], []
    for name, step in STEPS.items():
        run, notes = summary.runs.get(name), []
        if name in ("sam_masks", "scores") or (supervised and not run):
            continue
        if not run:
            notes.append(f"not made yet: step {step.number}")
        elif not run.finished:
            notes.append("not finished: the same command continues it")
        elif name in summary.outdated:
            notes.append("made from an earlier run: --overwrite makes it again")
        found.append(_card(f"{step.number}", step.title, own.get(name), notes, run))
        shown.append(own.get(name))
    others = [row for row in summary.rows if not any(row is each for each in shown)]
    return found + [_card("", row["title"], row, [], None) for row in others]


def _card(number: str, title: str, row: Row | None, notes: list[str], run: Run | None) -> dict[str, Any]:
    done = not notes
    if row:
        words = [word for word, holds in (("partial", row["partial"]), ("an older score", row["stale"])) if holds]
        notes = [", ".join([f"{row['split']} split", f"{row['images']} images", *words]), *notes]
    notes += [duration(run.seconds)] if run else []
    return {"number": number, "title": title, "score": row and percent(row["miou"]), "notes": notes, "done": done}


def write_report(summary: Summary, samples: Sequence[Sample]) -> None:
    """Write <experiment>/scores/report.html; samples beyond `MOST_BYTES` are left out, the last ones first."""
    dataset = summary.dataset
    finished = [STEPS[name] for name in STEPS if name in summary.runs and summary.runs[name].finished]
    following = next_step(finished[-1]) if finished else STEPS["classifier"]
    content = {
        "summary": summary,
        "dataset": dataset,
        "has_truth": any(dataset.labels(split).is_dir() for split in SPLITS),
        "following": following and following.command(summary.args),
        "evaluation": STEPS["scores"].command(summary.args),
        "cards": cards(summary),
        "table": table(summary),
        "per_class": per_class(summary),
        "shares": shares(summary),
        "lines": lines(summary),
        "curves": curves(summary.folder),
        "review": label_review(summary),
        "review_command": command_line(
            "datasetsprocess/label_page.py", summary.args, experiment=None, review=summary.experiment
        ),
        "confusions": list(summary.last.values()) if dataset.num_classes <= MOST_CLASSES else [],
        "names": {  # what the colours of a picture mean, for the words under the pointer
            "classes": {str(colour): name for name, colour in [("ignored", ERRORS["not counted"]), *dataset.legend]},
            "errors": {str(colour): name for name, colour in ERRORS.items()},
        },
    }
    template = page_template(Path(__file__).with_name("page.html.j2"), percent=percent, duration=duration)
    size, kept = len(template.render(content, samples=[], left_out=0).encode()), 0
    for sample in samples:
        size += sum(len(panel.source) + len(panel.title) + len(sample.id) + 300 for panel in sample.panels)
        kept += size <= MOST_BYTES
    page = template.render(content, samples=samples[:kept], left_out=len(samples) - kept)
    with write_whole(summary.folder / "scores" / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


def duration(seconds: float) -> str:
    """4 s, 3 min, 2.1 h"""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
