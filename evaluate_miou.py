"""Step 8: score every label folder of an experiment against the truth (method section 8).

Reads  experiments/<dataset>/<experiment>/{cams,pseudo_labels,...}/ and datasets/<dataset>/{train,test}/labels
Writes experiments/<dataset>/<experiment>/scores/: scores.json and scores.csv (fractions from 0 to 1), scores.md (the
       tables, in per cent), confusion_<split>.png, contact_sheet_<split>.png, report.html and samples.json (its
       pictures). All are written again each time; no other result depends on them

    python evaluate_miou.py --dataset vaihingen
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from report.label_folders import LabelFolder, load_prediction
from report.page import read_experiment, write_report
from report.patch_pictures import SamplesFile, draw_split
from report.score_tables import markdown, write_scores
from report.summary import scored
from tools.command import UserError, and_more, check, run
from tools.constants import Place, checked_constants
from tools.dataset import Dataset, load_dataset
from tools.files import remove_leftovers, write_json
from tools.labels import load_label
from tools.progress import Progress
from tools.runs import read_run
from tools.scores import ConfusionMatrix
from tools.step import experiment_folder, require
from tools.steps import LABEL_STEPS, SPLITS
from tools.workers import in_workers


@checked_constants
class Constants(Place):
    dataset: str = "vaihingen"  # vaihingen | potsdam | isaid | demo | the name of your own dataset.toml
    experiment: str = "prc"  # its label folders in experiments/<dataset>/<experiment>/ are scored
    stages: tuple[str, ...] = ()  # folders to score, such as segmentation; empty: every one that exists
    supervised: str = "supervised"  # experiment of the fully supervised run, the bound; used where it exists
    protocol: Literal["clean", "released"] = "clean"  # released: pixels predicted as a left-out class are dropped
    samples: Annotated[int, Field(ge=0, le=20)] = 2  # patches in the report: so many best, median and worst ones


PATCHES_A_PROCESS = 100  # for fewer patches, starting a process takes longer than scoring them here


def find_folders(dataset: Dataset, folder: Path, args: Constants) -> list[LabelFolder]:
    """The label folders to score, in the order of the steps, then the fully supervised ones of the same splits."""
    known = {step.folder_of(split): split for step in LABEL_STEPS.values() for split in SPLITS}
    for name in args.stages:
        check(
            name in known,
            f'stages holds "{name}", but label folders are called {", ".join(LABEL_STEPS)}, the last two with _train '
            "and the others with _test when they were made for the other split",
        )
    names = [name for name in known if (name in args.stages if args.stages else (folder / name).is_dir())]
    if not names:
        require(folder / "cams", args)  # its sentence says what to run
    found = [_label_folder(dataset, folder / name, known[name], args) for name in names]
    bound = experiment_folder(args.root, args.dataset, args.supervised)
    for split in dict.fromkeys(folder.split for folder in found):
        path = bound / LABEL_STEPS["segmentation"].folder_of(split)
        if bound != folder and path.is_dir():
            found.append(_label_folder(dataset, path, split, args))
    with_truth = [each for each in found if dataset.labels(each.split).is_dir()]
    for split in sorted({each.split for each in found} - {each.split for each in with_truth}):
        print(f"{dataset.labels(split)} is missing, so the {split} split is not scored")
    check(
        len(with_truth) > 0,
        f"{dataset.labels(found[0].split)} is missing: scores need label maps of the truth; without them, "
        f"{folder / 'scores' / 'report.html'} shows the pictures of each step",
    )
    return sorted(with_truth, key=lambda each: SPLITS.index(each.split))


def _label_folder(dataset: Dataset, path: Path, split: str, args: Constants) -> LabelFolder:
    experiment = path.parent.name
    try:
        run = read_run(path)  # an unfinished folder is scored in part
    except FileNotFoundError:
        run = require(path, args, experiment=experiment, split="" if path.name in LABEL_STEPS else split)
    matrix = ConfusionMatrix(dataset.num_classes)
    return LabelFolder(path, split, run, matrix, is_bound=experiment == args.supervised)


def score_image(id: str, dataset: Dataset, split: str, folders: Sequence[Path]) -> tuple[dict, list[str]]:
    """One image against the truth: folder -> counts (K,K+1), and a sentence for each file that cannot be scored."""
    counts, failures = {}, []
    file = dataset.labels(split) / f"{id}.png"
    try:
        truth = load_label(file, dataset.num_classes)
    except UserError as error:
        return {}, [str(error)]
    for folder in folders:
        try:
            prediction = load_prediction(folder, id, dataset.num_classes, truth.shape)
            check(
                prediction.shape == truth.shape,
                f"{folder / id} is {prediction.shape[1]} x {prediction.shape[0]} pixels, but {file} is "
                f"{truth.shape[1]} x {truth.shape[0]}: make it again from the present images",
            )
            matrix = ConfusionMatrix(dataset.num_classes)
            matrix.update(truth, prediction)
            counts[folder] = matrix.counts
        except UserError as error:
            failures.append(str(error))
    return counts, failures


def score(dataset: Dataset, folders: Sequence[LabelFolder], args: Constants) -> list[str]:
    """Fill the folders of one split; each truth is read once for all of them, and no prediction is kept."""
    split, failures = folders[0].split, []
    ids, left_out = dataset.ids(split), np.flatnonzero(~dataset.scored)
    work = partial(score_image, dataset=dataset, split=split, folders=[folder.path for folder in folders])
    workers = min(args.workers, len(ids) // PATCHES_A_PROCESS)
    with Progress(len(ids), f"scoring {split}") as bar:
        for id, (counts, bad) in zip(ids, in_workers(work, ids, workers if workers > 1 else 0, chunk=4), strict=True):
            failures += bad
            bar.update()
            for folder in folders:
                matrix = ConfusionMatrix(dataset.num_classes)
                if folder.path not in counts:
                    folder.partial = True
                    continue
                matrix.counts += counts[folder.path]
                folder.matrix.merge(matrix)
                folder.per_image[id] = matrix.scores(left_out, args.protocol)["miou"]
                folder.present[id] = int(matrix.counts[dataset.scored].any(axis=1).sum())
    return failures


def main(args: Constants) -> None:
    begin = time.monotonic()
    dataset = load_dataset(args.dataset, args.root)
    experiment = experiment_folder(args.root, args.dataset, args.experiment)
    folders = find_folders(dataset, experiment, args)
    splits = {split: [folder for folder in folders if folder.split == split] for split in SPLITS}
    failures = [line for part in splits.values() if part for line in score(dataset, part, args)]
    output, stages = experiment / "scores", [scored(folder) for folder in folders]
    summary = read_experiment(args, dataset)
    bound = {}
    if any(folder.is_bound for folder in folders):
        bound = read_experiment(replace(args, experiment=args.supervised), dataset).runs
    summary = replace(summary, protocol=args.protocol, stages=stages, failures=failures, bound_runs=bound)
    remove_leftovers(output)
    samples = {
        split: draw_split(dataset, output, ready, args.experiment, args.samples, failures)
        for split, part in splits.items()
        if (ready := [folder for folder in part if folder.per_image])
    }
    write_scores(output, summary)  # after the pictures, which may add failures
    write_json(output / "samples.json", SamplesFile(samples).model_dump())
    write_report(summary, [sample for split in SPLITS for sample in samples.get(split, [])])
    print(markdown(summary))
    print(f"\nmade: {output}, scores of {len(stages)} label folders, {time.monotonic() - begin:.0f} s")
    print(f"look at: {output / 'report.html'}")
    check(
        not failures,
        f"{len(failures)} files could not be scored, so the scores are partial:\n  {and_more(failures)}",
    )


if __name__ == "__main__":
    run(main, Constants, __doc__, one_process=True)
