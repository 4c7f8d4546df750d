"""report.html, the record of an experiment: one file that opens in any browser without a network.

evaluate_miou.py writes it with the scores, the truth and the errors; every other step renews it with what can be shown
without the truth. The data is prepared here; page.html.j2 lays it out and escapes every name.
"""

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from report.patch_pictures import ERRORS, Sample, SamplesFile, pack, panels
from report.score_tables import class_table, notes, score_table
from report.stages import Stage, stage_of, state_of
from report.summary import Row, ScoresFile, Summary, percent
from tools.command import UserError
from tools.dataset import Dataset, load_dataset
from tools.files import Model, read_json, write_whole
from tools.logs import read_log
from tools.pages import page_template
from tools.pictures import sample_ids
from tools.review import Review, review
from tools.runs import Run
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
        summary = read_summary(args, load_dataset(args.dataset, args.root))
        scores = _read_back(summary.folder / "scores" / "scores.json", ScoresFile, summary.broken)
        stored = _read_back(summary.folder / "scores" / "samples.json", SamplesFile, summary.broken)
        if scores and scores.classes == list(summary.dataset.classes):  # else made before the classes were changed
            for stage in scores.stages:
                stage.stale = _is_stale(stage, summary)
            summary = replace(summary, stages=scores.stages, protocol=scores.protocol)
        samples: list[Sample] = []
        for split in SPLITS:
            samples += _samples(summary, split, stored.root.get(split, []) if stored else [])
        write_report(summary, samples)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"the step is done, but its report could not be renewed ({reason})", file=sys.stderr)


def read_summary(args: Any, dataset: Dataset) -> Summary:
    """The runs of every step of the experiment, and of step 9 where one of them reads its masks. No scores."""
    folder = experiment_folder(args.root, args.dataset, args.experiment)
    files = {file.parent.name: file for file in sorted(folder.glob("*/run.json"))}
    broken: list[str] = []
    runs = _read_runs(files, broken)
    if any("sam_masks" in run.reads for run in runs.values()):
        masks = {f"sam_masks, {split} split": dataset.sam_masks(split) / "run.json" for split in SPLITS}
        runs |= _read_runs(masks, broken)
    runs = dict(sorted(runs.items(), key=lambda item: item[1].started))
    labels = {dataset.image_labels_hash(split) for split in SPLITS if dataset.image_labels_file(split).exists()}
    return Summary(args, dataset, folder, runs, outdated_runs(runs, labels), broken)


def _read_runs(files: dict[str, Path], broken: list[str]) -> dict[str, Run]:
    runs = {name: _read_back(file, Run, broken) for name, file in files.items()}
    return {name: run for name, run in runs.items() if run}


def _read_back(file: Path, model: type[Model], broken: list[str]) -> Model | None:
    """The content of a JSON file; None where it is missing, or damaged, of which a sentence goes to `broken`."""
    try:
        return read_json(file, model, "run its step again with --overwrite")
    except FileNotFoundError:
        return None
    except UserError as error:
        if str(error) not in broken:
            broken.append(str(error))
        return None


def outdated_runs(runs: dict[str, Run], labels: set[str]) -> set[str]:
    """The runs with an input that has changed since, at any distance.

    `runs` in the order of their start, so that inputs come first; `labels`: the hashes of image_labels.csv.
    """
    outdated, current = set(), labels | {run.started for run in runs.values()}
    for name, run in runs.items():
        for source, started in run.reads.items():
            of_other = run.constants.get(source)  # this constant names another experiment, whose folder was read
            known = source == "image_labels" or any(other.startswith(source) for other in runs)
            if known and not of_other and started not in current:
                outdated.add(name)
                current.discard(run.started)
    return outdated


def _is_stale(stage: Stage, summary: Summary) -> bool:
    """Whether a scored folder, or an input of it, has changed since."""
    run = _read_back(summary.folder.parent / stage.experiment / stage.stage / "run.json", Run, summary.broken)
    outdated = stage.experiment == summary.name and stage.stage in summary.outdated
    return outdated or run is None or state_of(run) != stage.made


def _samples(summary: Summary, split: str, stored: Sequence[Sample]) -> Sequence[Sample]:
    """`stored`, the samples of the last evaluation, where they still hold, else some patches without the truth."""
    stages = []
    for step in LABEL_STEPS.values():
        run = summary.runs.get(step.folder_of(split))
        if run and run.finished:
            stages.append(stage_of(summary.folder / step.folder_of(split), split, run))
    scored = [stage for stage in summary.stages if stage.split == split]
    own = {stage.stage for stage in scored if stage.experiment == summary.name}
    if scored and own == {stage.stage for stage in stages} and not any(stage.stale for stage in scored):
        return stored
    samples: list[Sample] = []
    for id in sample_ids(summary.dataset.ids(split), UNSCORED_SAMPLES) if stages else []:
        with suppress(UserError):  # steps report the files that they cannot read
            pictures = pack(panels(summary.dataset, id, stages, with_maps=True))
            samples.append(Sample(id=id, split=split, panels=pictures, result=stages[-1].title))
    return samples


def read_review(summary: Summary) -> Review | None:
    """What the classifier says of the image-level labels; None before step 2."""
    cams = summary.runs.get("cams")
    if cams and cams.finished and summary.dataset.image_labels_file("train").exists():
        with suppress(UserError):  # steps report the files that they cannot read
            return review(summary.dataset, summary.folder / "cams")
    return None


def curves(folder: Path) -> list[dict[str, Any]]:
    """What the log.jsonl of each training holds: a group of its losses, and one for each entry with parts (classes).

    A curve has the ends of its axis, `low` and `high`; parts share an axis, from 0 to 1 where all values lie there.
    """
    groups: dict[str, dict[str, Points]] = {}
    of_parts = set()
    for file in sorted(folder.glob("*/log.jsonl")):
        for entry in read_log(file):
            for name, value in entry.items():
                title, values = file.parent.name, {name: value}
                if isinstance(value, dict):
                    title, values = f"{title}: {name.replace('_', ' ')}", value
                    of_parts.add(title)
                elif name in NOT_CURVES:
                    continue
                for part, number in values.items():
                    if isinstance(number, int | float) and abs(number) < 1e300:  # not NaN either
                        groups.setdefault(title, {}).setdefault(part, []).append((entry["epoch"], number))
    result = []
    for title, points_of in groups.items():
        shared = [value for points in points_of.values() for _, value in points]
        in_unit = min(shared) >= 0 and max(shared) <= 1
        lines = []
        for name, points in points_of.items():
            axis = [value for _, value in points]
            if title in of_parts:
                axis = [0, 1] if in_unit else shared
            lines.append({"name": name, "points": points, "low": min(axis), "high": max(axis)})
        result.append({"title": title, "curves": lines})
    return result


@dataclass(frozen=True)
class Card:
    """A step, or a scored stage, in the run at a glance. `fault`: why it is not done."""

    title: str
    row: Row | None
    number: int | None = None
    fault: str = ""
    run: Run | None = None


def cards(summary: Summary) -> list[Card]:
    """A card for each step, then one for each further scored stage, such as the bound."""
    cards = []
    rows = {(row["experiment"], row["stage"]): row for row in summary.rows}
    supervised = "supervision" in summary.facts  # such a run has no pseudo-labels
    for name, step in STEPS.items():
        run, fault = summary.runs.get(name), ""
        if name in ("sam_masks", "scores") or (supervised and not run):
            continue
        if not run:
            fault = f"not made yet: step {step.number}"
        elif not run.finished:
            fault = "not finished: the same command continues it"
        elif name in summary.outdated:
            fault = "made from an earlier run: --overwrite makes it again"
        cards.append(Card(step.title, rows.pop((summary.name, name), None), step.number, fault, run))
    return cards + [Card(row["title"], row) for row in rows.values()]


def write_report(summary: Summary, samples: Sequence[Sample]) -> None:
    """Write <experiment>/scores/report.html; samples beyond `MOST_BYTES` are left out, the last ones first."""
    args, dataset = summary.args, summary.dataset
    finished = [step for name, step in STEPS.items() if name in summary.runs and summary.runs[name].finished]
    following = next_step(finished[-1]) if finished else STEPS["classifier"]
    content = {
        "summary": summary,
        "dataset": dataset,
        "has_truth": any(dataset.labels(split).is_dir() for split in SPLITS),
        "following": following and following.command(args),
        "evaluation": STEPS["scores"].command(args),
        "cards": cards(summary),
        "scores": score_table(summary),
        "notes": notes(summary),
        "class_scores": class_table(summary),
        "groups": curves(summary.folder),
        "labels": read_review(summary),
        "review_command": command_line("datasetsprocess/label_page.py", args, experiment=None, review=summary.name),
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
    with write_whole(summary.folder / "scores" / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


def duration(seconds: float) -> str:
    """4 s, 3 min, 2.1 h"""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
