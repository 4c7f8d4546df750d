"""Step 8: score every label folder of an experiment against the truth (method, section 8: evaluation).

Reads  experiments/<dataset>/<experiment>/{cams,pseudo_labels,...}/ and datasets/<dataset>/{train,test}/labels
Writes experiments/<dataset>/<experiment>/scores/: scores.json and scores.csv (fractions from 0 to 1), scores.md (the
       table, in per cent), confusion_<split>.png, contact_sheet_<split>.png, report.html and samples.json (the page's
       pictures); anew each time. The other steps renew the page, but no result of theirs rests on anything here

    python evaluate_miou.py --dataset vaihingen
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from report.page import accounts, write_report
from report.patch_pictures import ERRORS, choose, load_prediction, panels, sample
from report.score_tables import STAGES, Stage, markdown, summarise, write_csv
from tools.command import UserError, check, run
from tools.dataset import SPLITS, Dataset, load_dataset
from tools.files import remove_leftovers, write_json, write_whole
from tools.labels import load_label
from tools.masks import load_masks
from tools.pictures import confusion_picture, contact_sheet, sample_ids
from tools.scores import ConfusionMatrix
from tools.step import ROOT, experiment_folder, require, step_name
from tools.workers import worker_pool


@dataclass(frozen=True)
class Constants:
    dataset: str = "vaihingen"  # vaihingen | potsdam | isaid | demo | the name of your own dataset.toml
    experiment: str = "prc"  # its label folders in experiments/<dataset>/<experiment>/ are scored
    stages: tuple[str, ...] = ()  # folders to score, such as segmentation; none: every one that is there
    supervised: str = "supervised"  # experiment of the fully supervised run: the bound, when it is there
    protocol: Literal["clean", "released"] = "clean"  # released: pixels predicted as a left-out class are dropped
    samples: int = 2  # best, median and worst patches of each split in the report, so many of each
    workers: int = 4  # processes; 0 works in this one
    root: Path = ROOT  # folder that holds datasets/ and experiments/


PATCHES_A_PROCESS = 100  # for fewer, starting a process takes longer than scoring them here


def main(constants: Constants) -> None:
    check(constants.workers >= 0, f"workers is {constants.workers}, but it must be 0 or more")
    check(0 <= constants.samples <= 20, f"samples is {constants.samples}, but it must be from 0 to 20")
    dataset = load_dataset(constants.dataset, constants.root)
    folder = experiment_folder(constants.root, constants.dataset, constants.experiment)
    stages = find_stages(dataset, folder, constants)
    failures = []
    for split in SPLITS:
        if here := [stage for stage in stages if stage.split == split]:
            failures += score(dataset, split, here, constants)
    runs = accounts(folder, dataset)
    summary = summarise(dataset, stages, runs, failures, constants.experiment, constants.supervised, constants.protocol)
    write_files(dataset, folder / "scores", stages, summary, runs, failures, constants)
    print(markdown(summary))
    print(f"\nreport: {folder / 'scores' / 'report.html'}")
    if failures:
        shown = "\n  ".join(failures[:20] + [f"and {len(failures) - 20} more"] * (len(failures) > 20))
        raise UserError(f"{len(failures)} files could not be scored, so the scores are partial:\n  {shown}")


def find_stages(dataset: Dataset, folder: Path, constants: Constants) -> list[Stage]:
    """The label folders to score, in the order of the steps, then the fully supervised ones of the same splits."""
    check(
        folder.is_dir(),
        f"{folder} is missing: run steps 1 to 7 with --experiment {constants.experiment} first, or "
        "name an experiment that is there",
    )
    known = [name + suffix for name in STAGES for suffix in ("", *(f"_{split}" for split in SPLITS))]
    names = constants.stages or tuple(name for name in known if (folder / name).is_dir())
    for name in names:
        check(
            name in known,
            f'stages holds "{name}", but label folders are called {", ".join(STAGES)}, the last two '
            "with _train and the others with _test when they were made for the other split",
        )
    check(len(names) > 0, f"{folder} holds no label folder yet: run step 2, python infer_classification.py")
    stages = [_stage(dataset, folder, name, constants.experiment) for name in sorted(set(names), key=known.index)]
    if constants.supervised != constants.experiment:
        bound = experiment_folder(constants.root, constants.dataset, constants.supervised)
        for split in SPLITS:
            name = step_name("segmentation", split, "test")
            if (bound / name).is_dir() and any(stage.split == split for stage in stages):
                stages.append(_stage(dataset, bound, name, constants.supervised, "fully supervised segmentation"))
    with_truth = [stage for stage in stages if dataset.labels(stage.split).is_dir()]
    for split in sorted({stage.split for stage in stages if stage not in with_truth}):
        print(f"{dataset.labels(split)} is missing, so the {split} split is not scored")
    check(bool(with_truth), f"{dataset.labels(stages[0].split)} is missing: scoring needs label maps of the truth")
    return sorted(with_truth, key=lambda stage: SPLITS.index(stage.split))


def _stage(dataset: Dataset, folder: Path, name: str, experiment: str, title: str = "") -> Stage:
    try:
        account = json.loads((folder / name / "run.json").read_text(encoding="utf-8"))  # unfinished is scored in part
    except (OSError, ValueError):
        account = require(folder / name)
    base = next(step for step in STAGES if name in (step, f"{step}_train", f"{step}_test"))
    usual = name.rsplit("_", 1)[1] if name != base else STAGES[base][1]
    split = account.get("constants", {}).get("split", usual)
    return Stage(
        name, title or STAGES[base][0], experiment, split, folder / name, account, ConfusionMatrix(dataset.num_classes)
    )


def score_image(id: str, dataset: Dataset, split: str, folders: dict[str, Path]) -> tuple[dict, list[str]]:
    """One image against the truth: stage -> counts (K,K+1), and a sentence for each file that cannot be scored."""
    counts, failures = {}, []
    try:
        file = dataset.labels(split) / f"{id}.png"
        truth = load_label(file, dataset.num_classes)
    except UserError as error:
        return {}, [str(error)]
    for name, folder in folders.items():
        try:
            prediction = load_prediction(folder, id, dataset.num_classes, truth.shape)
            if prediction.shape != truth.shape:
                raise UserError(
                    f"{folder / id} is {prediction.shape[1]} x {prediction.shape[0]} pixels, but {file} is "
                    f"{truth.shape[1]} x {truth.shape[0]}: make it again from the present images"
                )
            matrix = ConfusionMatrix(dataset.num_classes)
            matrix.update(truth, prediction)
            counts[name] = matrix.counts
        except UserError as error:
            failures.append(str(error))
        except ValueError as error:  # class ids of another data set
            failures.append(f"{folder / id}: {error}")
    return counts, failures


def score(dataset: Dataset, split: str, stages: list[Stage], constants: Constants) -> list[str]:
    """Fill the stages of one split; each truth is read once for all of them, and no prediction is kept."""
    ids, failures = dataset.ids(split), []
    left_out = np.flatnonzero(~dataset.scored)
    work = partial(
        score_image,
        dataset=dataset,
        split=split,
        folders={f"{stage.experiment}/{stage.name}": stage.folder for stage in stages},
    )
    with _mapping(min(constants.workers, len(ids) // PATCHES_A_PROCESS)) as mapping:
        results = tqdm(mapping(work, ids), f"scoring {split}", len(ids), unit="image", disable=None)
        for id, (counts, bad) in zip(ids, results, strict=True):
            failures += bad
            for stage in stages:
                matrix = ConfusionMatrix(dataset.num_classes)
                if (key := f"{stage.experiment}/{stage.name}") in counts:
                    matrix.counts += counts[key]
                    stage.matrix.merge(matrix)
                    stage.per_image[id] = matrix.scores(left_out, constants.protocol)["miou"]
                    stage.present[id] = int(matrix.counts[dataset.scored].any(axis=1).sum())
                else:
                    stage.partial = True
    return failures


@contextmanager
def _mapping(workers: int) -> Iterator[Callable]:
    """A `map` that works in several processes, or the plain one."""
    if workers < 2:
        yield map
        return
    with worker_pool(workers) as pool:
        yield partial(pool.map, chunksize=4)


def write_files(
    dataset: Dataset,
    folder: Path,
    stages: list[Stage],
    summary: dict,
    runs: dict[str, dict],
    failures: list[str],
    constants: Constants,
) -> None:
    """Everything in scores/; each file appears whole. Pictures that cannot be read are added to `failures`."""
    remove_leftovers(folder)
    write_json(folder / "scores.json", summary)
    with write_whole(folder / "scores.md") as temporary:
        temporary.write_text(markdown(summary) + "\n", encoding="utf-8")
    write_csv(folder / "scores.csv", summary)
    samples: dict[str, list[dict]] = {}
    for split in SPLITS:
        here = [stage for stage in stages if stage.split == split and stage.per_image]
        if not here:
            continue
        last = [stage for stage in here if stage.experiment == constants.experiment or stage is here[0]][-1]
        confusion_picture(
            folder / f"confusion_{split}.png", last.matrix.counts, dataset.classes, f"{last.title}, {split} split"
        )
        scored = {id: last.per_image[id] for id in last.per_image if all(id in stage.per_image for stage in here)}
        show = partial(_panels, failures, dataset, split, stages=here, load_masks=load_masks, last=last)
        rows = [row for id in sample_ids(sorted(scored), 8) if (row := show(id))]
        titles = max(map(list, rows), key=len, default=[])
        contact_sheet(
            folder / f"contact_sheet_{split}.png",
            [[row.get(title) for title in titles] for row in rows],
            titles,
            [*zip(dataset.classes, dataset.colours, strict=True), *ERRORS.items()],
        )
        samples[split] = [
            sample(id, split, kind, scored[id], pictures)
            for kind, id in choose(scored, constants.samples, last.present)
            if (pictures := show(id, with_maps=True))
        ]
    write_json(folder / "samples.json", samples)
    write_report(folder.parent, dataset, summary, runs, [each for found in samples.values() for each in found])


def _panels(failures: list[str], *arguments, **options) -> dict[str, np.ndarray]:
    """`panels`; {} for a patch with a bad file, which is added to `failures`."""
    try:
        return panels(*arguments, **options)
    except UserError as error:
        failures += [str(error)] * (str(error) not in failures)
        return {}


if __name__ == "__main__":
    run(main, Constants, __doc__, one_process=True)
