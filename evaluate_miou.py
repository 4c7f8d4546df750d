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

from report.page import read_summary, write_report
from report.patch_pictures import SamplesFile, draw_split
from report.score_tables import markdown, write_scores
from report.stages import Stage, load_prediction, stage_of
from tools.command import UserError, and_more, check, run
from tools.constants import Place, checked_constants
from tools.dataset import Dataset, load_dataset
from tools.files import remove_leftovers, write_json
from tools.labels import load_label
from tools.progress import Progress
from tools.scores import ConfusionMatrix
from tools.step import experiment_folder, require
from tools.steps import LABEL_STEPS, SPLITS
from tools.workers import in_workers


@checked_constants
class Constants(Place):  # and root, overwrite, workers
    dataset: str = "vaihingen"  # vaihingen | potsdam | isaid | demo | the name of your own dataset.toml
    experiment: str = "prc"  # its label folders in experiments/<dataset>/<experiment>/ are scored
    stages: tuple[str, ...] = ()  # folders to score, such as segmentation; empty: every one that exists
    supervised: str = "supervised"  # experiment of the fully supervised run, the bound; used where it exists
    protocol: Literal["clean", "released"] = "clean"  # released: pixels predicted as a left-out class are dropped
    samples: Annotated[int, Field(ge=0, le=20)] = 2  # patches in the report: so many best, median and worst ones


PATCHES_A_PROCESS = 100  # for fewer patches, starting a process takes longer than scoring them here


def find_stages(dataset: Dataset, experiment: Path, args: Constants) -> list[Stage]:
    """The label folders to score, in the order of the steps, then the fully supervised ones of the same splits."""
    splits = {step.folder_of(split): split for step in LABEL_STEPS.values() for split in SPLITS}  # of each folder
    for name in args.stages:
        check(
            name in splits,
            f'stages holds "{name}", but label folders are called {", ".join(LABEL_STEPS)}, the last two with _train '
            "and the others with _test when they were made for the other split",
        )
    names = args.stages or [name for name in splits if (experiment / name).is_dir()]
    names = names or ["cams"]  # where there is none, the message says how to make the first
    folders = [experiment / name for name in splits if name in names]
    bound = experiment_folder(args.root, args.dataset, args.supervised)
    for split in dict.fromkeys(splits[folder.name] for folder in folders):
        folder = bound / LABEL_STEPS["segmentation"].folder_of(split)
        if bound != experiment and folder.is_dir():
            folders.append(folder)
    stages = []
    for folder in folders:
        split, origin = splits[folder.name], folder.parent.name
        option = "" if folder.name in LABEL_STEPS else split
        run = require(folder, args, unfinished=True, experiment=origin, split=option)
        stages.append(stage_of(folder, split, run, is_bound=origin == args.supervised))
    with_truth = [stage for stage in stages if dataset.labels(stage.split).is_dir()]
    for split in sorted({stage.split for stage in stages} - {stage.split for stage in with_truth}):
        print(f"{dataset.labels(split)} is missing, so the {split} split is not scored")
    check(
        len(with_truth) > 0,
        f"{dataset.labels(stages[0].split)} is missing: scores need label maps of the truth; without them, "
        f"{experiment / 'scores' / 'report.html'} shows the pictures of each step",
    )
    return sorted(with_truth, key=lambda stage: SPLITS.index(stage.split))


def count_image(
    id: str, dataset: Dataset, split: str, folders: Sequence[Path]
) -> tuple[dict[Path, ConfusionMatrix], list[str]]:
    """The pixels of one image, by class in the truth and class in the label map of each folder.

    Pixels that the truth ignores (255) are not counted; those that only the label map ignores are
    errors. Also returned: a sentence for each file that cannot be scored.
    """
    matrices: dict[Path, ConfusionMatrix] = {}
    failures = []
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
                f"{truth.shape[1]} x {truth.shape[0]}: run its step again with --overwrite",
            )
        except UserError as error:
            failures.append(str(error))
            continue
        matrices[folder] = ConfusionMatrix(dataset.num_classes)
        matrices[folder].update(truth, prediction)
    return matrices, failures


def score(dataset: Dataset, stages: Sequence[Stage], args: Constants) -> list[str]:
    """Count the images of each split for its stages -> a sentence for each file that cannot be scored.

    Each truth is read once for all stages, and no prediction is kept. The mean IoU of an image leaves out the pixels
    and the score of the classes that the data set leaves out, as that of all images does (`ConfusionMatrix.scores`).
    """
    failures, left_out = [], np.flatnonzero(~dataset.scored)
    for split in sorted({stage.split for stage in stages}, key=SPLITS.index):
        ids, of_split = dataset.ids(split), [stage for stage in stages if stage.split == split]
        count = partial(count_image, dataset=dataset, split=split, folders=[stage.path for stage in of_split])
        workers = min(args.workers, len(ids) // PATCHES_A_PROCESS)
        results = in_workers(count, ids, workers if workers > 1 else 0, chunk=4)
        totals = {stage.path: ConfusionMatrix(dataset.num_classes) for stage in of_split}
        with Progress(len(ids), f"scoring {split}") as bar:
            for id, (matrices, sentences) in zip(ids, results, strict=True):
                failures += sentences
                bar.update()
                for stage in of_split:
                    if stage.path not in matrices:
                        stage.partial = True
                        continue
                    matrix = matrices[stage.path]
                    totals[stage.path].counts += matrix.counts
                    stage.images += 1
                    stage.per_image[id] = matrix.scores(left_out, args.protocol)["miou"]
                    stage.present[id] = int(matrix.counts[dataset.scored].any(axis=1).sum())
        for stage in of_split:
            stage.confusion = totals[stage.path].counts.tolist()
    return failures


def main(args: Constants) -> None:
    begin = time.monotonic()
    dataset = load_dataset(args.dataset, args.root)
    output = experiment_folder(args.root, args.dataset, args.experiment) / "scores"
    stages = find_stages(dataset, output.parent, args)
    failures = score(dataset, stages, args)

    remove_leftovers(output)
    samples = SamplesFile({})
    for split in SPLITS:
        drawable = [stage for stage in stages if stage.split == split and stage.images]
        if drawable:
            samples.root[split] = draw_split(dataset, output, drawable, args.experiment, args.samples, failures)
    write_json(output / "samples.json", samples.model_dump())

    summary = replace(read_summary(args, dataset), stages=stages, protocol=args.protocol, failures=failures)
    if any(stage.is_bound for stage in stages):
        bound = read_summary(replace(args, experiment=args.supervised), dataset)
        summary = replace(summary, bound_runs=bound.runs)
    write_scores(output, summary)
    write_report(summary, [sample for split in samples.root for sample in samples.root[split]])
    print(markdown(summary))
    print(f"\nmade: {output}, scores of {len(stages)} label folders, {time.monotonic() - begin:.0f} s")
    print(f"look at: {output / 'report.html'}")
    check(
        not failures,
        f"{len(failures)} files could not be scored, so the scores are partial:\n  {and_more(failures)}",
    )


if __name__ == "__main__":
    run(main, Constants, __doc__, one_process=True)
