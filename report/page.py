"""report.html, the record of an experiment: one file that opens in any browser without a network.

evaluate_miou.py writes it with the scores, the truth and the errors; every other step renews it with what can be shown
without the truth. The data is prepared here; page.html.j2 lays it out and escapes every name.
"""

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from report.patch_pictures import ERRORS, Sample, SamplesFile, pack, panels
from report.score_tables import class_table, doubt_table, label_table, notes, score_table
from report.stages import Stage
from report.summary import Experiment, Row, Scored, ScoresFile, Summary, percent, state_of
from tools.command import UserError
from tools.dataset import Dataset, load_dataset
from tools.files import Model, read_json, write_whole
from tools.logs import read_log
from tools.pages import page_template
from tools.pictures import sample_ids
from tools.review import Review, review
from tools.runs import Run
from tools.scores import ConfusionMatrix
from tools.step import experiment_folder
from tools.steps import LABEL_STEPS, SPLITS, STEPS, command_line, next_step

MOST_BYTES = 4_800_000  # of the page: samples beyond this size are left out
MOST_CLASSES = 60  # of a confusion matrix in the page
UNSCORED_SAMPLES = 3  # patches of each split that are shown before there are scores to choose them by
NOT_CURVES = {"epoch", "step", "steps", "lr", "learning_rate", "images_per_second", "seconds", "time"}
Points = list[tuple[int, float]]


def renew(args: Any) -> None:
    """Draw scores/report.html again from what is on disk, after a step. No pixel label is opened.

    Scores and samples of the last evaluate_miou.py stay while the folders that they were made from are unchanged; after
    that the scores are marked as older, and the samples are drawn again without the truth. Any fault is one line on
    stderr: a page must never cost the hours of a training.
    """
    try:
        experiment = read_experiment(args, load_dataset(args.dataset, args.root))
        folder, broken = experiment.folder / "scores", experiment.broken
        scores = _read_back(folder / "scores.json", ScoresFile, broken) or ScoresFile()
        stored = _read_back(folder / "samples.json", SamplesFile, broken) or SamplesFile({})
        if scores.classes != list(experiment.dataset.classes):
            scores = ScoresFile()  # made before the classes were changed
        stages = [stage.model_copy(update={"stale": _is_stale(stage, experiment)}) for stage in scores.stages]
        samples: list[Sample] = []
        for split in SPLITS:
            samples += _samples(experiment, split, stages, stored.root.get(split, []))
        write_report(Summary(experiment, stages, scores.protocol), samples)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"the step is done, but its report could not be renewed ({reason})", file=sys.stderr)


def read_experiment(args: Any, dataset: Dataset) -> Experiment:
    """The runs of every step of the experiment, and of step 9 where one of them reads its masks."""
    folder = experiment_folder(args.root, args.dataset, args.experiment)
    runs: dict[str, Run] = {}
    broken: list[str] = []
    for file in sorted(folder.glob("*/run.json")):
        if run := _read_back(file, Run, broken):
            runs[file.parent.name] = run
    if any("sam_masks" in run.reads for run in runs.values()):
        for split in SPLITS:
            if run := _read_back(dataset.sam_masks(split) / "run.json", Run, broken):
                runs[f"sam_masks, {split} split"] = run
    runs = dict(sorted(runs.items(), key=lambda item: item[1].started))
    labels = {dataset.image_labels_hash(split) for split in SPLITS if dataset.image_labels_file(split).exists()}
    return Experiment(args, dataset, folder, runs, outdated_runs(runs, labels), broken)


def _read_back(file: Path, model: type[Model], broken: list[str]) -> Model | None:
    """The content of a JSON file; None where it is missing, or damaged, of which a sentence goes to `broken`."""
    try:
        return read_json(file, model, "run its step again with --overwrite")
    except FileNotFoundError:
        pass
    except UserError as error:
        broken.append(str(error))
    return None


def outdated_runs(runs: dict[str, Run], labels: set[str]) -> set[str]:
    """The runs with an input that has changed since, at any distance.

    `runs` in the order of their start, so that inputs come first; `labels`: the hashes of image_labels.csv.
    """
    present = {run.started: name for name, run in runs.items()} | dict.fromkeys(labels, "image_labels")
    outdated: set[str] = set()
    for name, run in runs.items():
        for source, started in run.reads.items():
            if run.constants.get(source):
                continue  # the input of another experiment, which this constant names
            known = source == "image_labels" or any(other.startswith(source) for other in runs)
            if present.get(started) in outdated or (known and started not in present):
                outdated.add(name)
    return outdated


def _is_stale(stage: Scored, experiment: Experiment) -> bool:
    """Whether a scored folder has changed since, or an input of it."""
    if stage.experiment == experiment.name:
        run = experiment.runs.get(stage.stage)
        outdated = stage.stage in experiment.outdated
    else:
        file = experiment.folder.parent / stage.experiment / stage.stage / "run.json"
        run = _read_back(file, Run, experiment.broken)
        outdated = False
    return run is None or state_of(run) != stage.made or outdated


def _samples(
    experiment: Experiment, split: str, scored: Sequence[Scored], stored: Sequence[Sample]
) -> Sequence[Sample]:
    """`stored`, the samples of the last evaluation, where they still hold, else some patches with what the steps made.

    `scored`: the stages of that evaluation.
    """
    dataset, stages = experiment.dataset, []
    for step in LABEL_STEPS.values():
        name = step.folder_of(split)
        run = experiment.runs.get(name)
        if run and run.finished:
            stages.append(Stage(experiment.folder / name, split, run, ConfusionMatrix(dataset.num_classes)))
    scored = [stage for stage in scored if stage.split == split]
    own = {stage.stage for stage in scored if stage.experiment == experiment.name}
    if scored and own == {stage.path.name for stage in stages} and not any(stage.stale for stage in scored):
        return stored
    if not stages:
        return []
    samples, result = [], stages[-1].title
    for id in sample_ids(dataset.ids(split), UNSCORED_SAMPLES):
        with suppress(UserError):  # steps report the files that they cannot read
            pictures = pack(panels(dataset, id, stages, with_maps=True))
            samples.append(Sample(id=id, split=split, kind="sample", score=None, panels=pictures, result=result))
    return samples


def read_review(experiment: Experiment) -> Review | None:
    """What the classifier says of the image-level labels; None before step 2."""
    cams = experiment.runs.get("cams")
    if not (cams and cams.finished and experiment.dataset.image_labels_file("train").exists()):
        return None
    try:
        return review(experiment.dataset, experiment.folder / "cams")
    except UserError:  # steps report the files that they cannot read
        return None


def curves(folder: Path) -> list[dict[str, Any]]:
    """What the log.jsonl of each training holds: a group of its losses, and one for each entry with parts (classes)."""
    groups: dict[tuple[str, bool], dict[str, Points]] = {}
    for file in sorted(folder.glob("*/log.jsonl")):
        for entry in read_log(file):
            for name, value in entry.items():
                title, values, has_parts = file.parent.name, {name: value}, isinstance(value, dict)
                if has_parts:
                    title, values = f"{title}: {name.replace('_', ' ')}", value
                elif name in NOT_CURVES:
                    continue
                for part, number in values.items():
                    if isinstance(number, int | float) and abs(number) < 1e300:  # not NaN either
                        points = groups.setdefault((title, has_parts), {}).setdefault(part, [])
                        points.append((entry["epoch"], number))
    return [_group(title, points, has_parts) for (title, has_parts), points in groups.items()]


def _group(title: str, curves: dict[str, Points], share_axis: bool) -> dict[str, Any]:
    """Each curve with the ends of its axis; a shared one goes from 0 to 1 where all values lie there."""
    values = {name: [value for _, value in points] for name, points in curves.items()}
    if share_axis:
        together = [value for part in values.values() for value in part]
        in_unit = min(together) >= 0 and max(together) <= 1
        values = dict.fromkeys(values, [0, 1] if in_unit else together)
    ends = {name: {"low": min(values[name]), "high": max(values[name])} for name in curves}
    return {"title": title, "curves": [{"name": name, "points": curves[name]} | ends[name] for name in curves]}


def cards(summary: Summary) -> list[dict[str, Any]]:
    """The run at a glance, a card for each step and each scored stage: title, score (or None), notes, whether done."""
    experiment = summary.experiment
    own = {row["stage"]: row for row in summary.rows if row["experiment"] == experiment.name}
    supervised = "supervision" in summary.facts  # such a run has no pseudo-labels
    cards, shown = [], []
    for name, step in STEPS.items():
        run, notes = experiment.runs.get(name), []
        if name in ("sam_masks", "scores") or (supervised and not run):
            continue
        if not run:
            notes.append(f"not made yet: step {step.number}")
        elif not run.finished:
            notes.append("not finished: the same command continues it")
        elif name in experiment.outdated:
            notes.append("made from an earlier run: --overwrite makes it again")
        cards.append(_card(str(step.number), step.title, own.get(name), notes, run))
        shown.append(name)
    for row in summary.rows:
        if row["experiment"] != experiment.name or row["stage"] not in shown:
            cards.append(_card("", row["title"], row, [], None))
    return cards


def _card(number: str, title: str, row: Row | None, faults: list[str], run: Run | None) -> dict[str, Any]:
    notes = []
    if row:
        marks = [word for word, holds in (("partial", row["partial"]), ("an older score", row["stale"])) if holds]
        notes.append(", ".join([f"{row['split']} split", f"{row['images']} images", *marks]))
    notes += faults
    if run:
        notes.append(duration(run.seconds))
    return {"number": number, "title": title, "score": row and percent(row["miou"]), "notes": notes, "done": not faults}


def write_report(summary: Summary, samples: Sequence[Sample]) -> None:
    """Write <experiment>/scores/report.html; samples beyond `MOST_BYTES` are left out, the last ones first."""
    experiment, dataset, label_review = summary.experiment, summary.dataset, read_review(summary.experiment)
    finished = [step for name, step in STEPS.items() if name in experiment.runs and experiment.runs[name].finished]
    following = next_step(finished[-1]) if finished else STEPS["classifier"]
    content = {
        "summary": summary,
        "experiment": experiment,
        "dataset": dataset,
        "has_truth": any(dataset.labels(split).is_dir() for split in SPLITS),
        "following": following and following.command(experiment.args),
        "evaluation": STEPS["scores"].command(experiment.args),
        "cards": cards(summary),
        "scores": score_table(summary),
        "notes": notes(summary),
        "class_scores": class_table(summary),
        "groups": curves(experiment.folder),
        "labels": label_review and label_table(label_review),
        "doubts": label_review and doubt_table(label_review),
        "review_command": command_line(
            "datasetsprocess/label_page.py", experiment.args, experiment=None, review=experiment.name
        ),
        "confusions": list(summary.last.values()) if dataset.num_classes <= MOST_CLASSES else [],
        "names": {  # what the colours of a picture mean, for the words under the pointer
            "classes": {str(colour): name for name, colour in [("ignored", ERRORS["not counted"]), *dataset.legend]},
            "errors": {str(colour): name for name, colour in ERRORS.items()},
        },
    }
    template = page_template(Path(__file__).with_name("page.html.j2"), percent=percent, duration=duration)
    size = len(template.render(content, samples=[], left_out=0).encode())
    fitting = []
    for sample in samples:
        size += sum(len(panel.source) + len(panel.title) + len(sample.id) + 300 for panel in sample.panels)
        if size <= MOST_BYTES:
            fitting.append(sample)
    page = template.render(content, samples=fitting, left_out=len(samples) - len(fitting))
    with write_whole(experiment.folder / "scores" / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


def duration(seconds: float) -> str:
    """4 s, 3 min, 2.1 h"""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
