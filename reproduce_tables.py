"""Run the steps for every row of one of the paper's tables and print it.

Reads  datasets/<dataset> with its SAM masks (process.py and step 9 done)
Writes experiments/<dataset>/tables-*/ (one experiment for each setting and seed, shared by the tables) and
       experiments/<dataset>/tables/<table>.md, .csv and .png; all of them tables-released* under the released protocol

    python reproduce_tables.py --table ablation --dataset vaihingen --seeds 0 1 2

Rows that are there already are not run again; a stopped table continues with the same command. Constants of the two
trainings are set by --classification.<constant> and --segmentation.<constant>.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import generate_refined_pseudo
import generate_refined_seg
import make_pseudo_labels
import train_classification
import train_segmentation
from tables.runner import Row, Runner
from tables.table import SHARE, Lines, write_table
from tools.cams import check_inference
from tools.command import check, run
from tools.dataset import Dataset, load_dataset
from tools.step import NOT_SETTINGS, ROOT, experiment_folder, process_state, require


@dataclass(frozen=True)
class Constants:
    table: Literal["main", "ablation", "gamma", "lambda", "tiles", "tau"] = "main"  # which of the tables
    dataset: str = "vaihingen"  # vaihingen | potsdam | isaid | demo | the name of your own dataset.toml
    experiment: str = "tables"  # where the names of its folders begin: another one for other constants
    seeds: tuple[int, ...] = (0,)  # with several, the table shows mean and standard deviation
    protocol: Literal["clean", "released"] = "clean"  # as in steps 1, 5, 7 and 8
    segment: bool = True  # False leaves the segmentation out of the tables ablation and tau, and saves steps 5 to 7
    gammas: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9)  # of the table gamma
    ir_weights: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.4)  # of the table lambda
    tiles: tuple[int, ...] = (1, 4, 16)  # of the table tiles
    taus: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.8, 0.85, 0.9, 0.95)  # of the table tau
    classification: train_classification.Constants = field(default_factory=train_classification.Constants)  # step 1
    segmentation: train_segmentation.Constants = field(default_factory=train_segmentation.Constants)  # step 5
    pseudo: make_pseudo_labels.Constants = field(default_factory=make_pseudo_labels.Constants)  # step 3
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto is bf16 where GPU or CPU (AMX) compute in it, else fp32
    workers: int = 4  # processes that read and write
    images_at_once: int = 8  # patches of one batch of the inference steps
    scales: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)  # of the inference steps
    root: Path = ROOT  # folder that holds datasets/ and experiments/


WHOLE = "+ PRC + IR"  # the ablation's row of the whole method
TRUTH = "(USES THE TRUTH)"


def rows_of(constants: Constants, background: bool = False) -> list[Row]:
    """The rows of a table; `background`: the data set has a background class."""
    extension = [Row(f"{WHOLE}, background by threshold (extension)", pseudo={"background": "threshold"})]
    return {
        "main": [Row("PRC + IR + IOS", segment=True)],
        "ablation": [
            Row("CAM", {"iterations": 0, "ir_weight": 0.0}, segment=constants.segment),
            Row("+ PRC", {"ir_weight": 0.0}),
            Row("+ IR", {"iterations": 0}),
            Row(WHOLE, segment=constants.segment),
            *(extension if background else []),
        ],
        "gamma": [Row(f"gamma {value:g}", {"gamma": value}) for value in constants.gammas],
        "lambda": [Row(f"lambda {value:g}", {"ir_weight": value}) for value in constants.ir_weights],
        "tiles": [Row(f"{value} tiles", {"tiles": value}) for value in constants.tiles],
        "tau": [Row("", segment=constants.segment)],
    }[constants.table]


STAGES = {  # stage -> column
    "cams": "CAM",
    "pseudo_labels": "+ CRF",
    "refined_pseudo_labels": "+ IOS",
    "segmentation": "segmentation",
    "refined_segmentation": "segmentation + IOS",
}


SHARED = {"dataset", "experiment", "split", "protocol", "seed", "labels", "cams", "precision", "workers", "root",
          "overwrite"}  # fmt: skip


def check_constants(constants: Constants, dataset: Dataset) -> None:
    """What a later row would stumble over after hours is refused before the first one."""
    for name in ("seeds", "gammas", "ir_weights", "tiles", "taus"):
        values = getattr(constants, name)
        check(len(set(values)) == len(values) > 0, f"{name} is {values}, but needs different numbers")
    check(all(0 <= seed < 2**31 for seed in constants.seeds), f"seeds is {constants.seeds}: from 0 to 2147483647 only")
    check(all(0 <= tau <= 1 for tau in constants.taus), f"taus is {constants.taus}, but they must lie between 0 and 1")
    check(constants.segment or constants.table != "main", "segment is False, but the table main is about segmentation")
    for name in ("classification", "segmentation", "pseudo"):
        part = getattr(constants, name)
        for key in SHARED:
            check(
                getattr(part, key, None) == getattr(type(part)(), key, None),
                f"{name}.{key} was set, but the tables set it themselves: leave it, or set {key} where there is one",
            )
    check(
        constants.table != "ablation" or constants.pseudo.background == "cam",
        "pseudo.background is threshold, but the ablation has a row of its own for it: leave it",
    )
    check_inference(constants)
    make_pseudo_labels.check_constants(constants.pseudo, dataset)
    for row in rows_of(constants):
        train_classification.check_constants(replace(constants.classification, **row.changes), dataset)
        if row.segment:
            train_segmentation.check_constants(constants.segmentation, dataset)


def main(constants: Constants) -> None:
    dataset = load_dataset(constants.dataset, constants.root)
    check_constants(constants, dataset)
    for split in ("train", "test"):
        dataset.image_labels(split)
        require(dataset.sam_masks(split))
    prefix = constants.experiment + ("-released" if constants.protocol == "released" else "")
    folder = experiment_folder(constants.root, dataset.name, prefix)
    background = dataset.background is not None
    lines: Lines = {}

    def put(row: str, column: str, value: float) -> None:
        lines.setdefault(row, {}).setdefault(column, []).append(value)

    for seed in constants.seeds:
        runner = Runner(constants, dataset, prefix, seed)
        experiments = {}
        for row in rows_of(constants, background):
            experiments[row.name] = experiment = runner.pseudo_labels(row)
            if row.segment:
                runner.segmentation(experiment)
            if constants.table == "tau":
                sweep_tau(runner, experiment, row, put)
                continue
            found = runner.scores(experiment)
            for stage, column in STAGES.items():
                if stage in found and (row.segment or stage not in ("segmentation", "refined_segmentation")):
                    put(row.name, column, found[stage])
        if constants.table == "ablation":
            show_limits(runner, experiments, background, put)
        if constants.table == "main":
            bound = runner.scores(runner.supervised())["segmentation"]
            put("fully supervised", STAGES["segmentation"], bound)
            put(row.name, SHARE, 100 * found["refined_segmentation"] / bound)
    published = {}
    if constants.table == "main" and dataset.paper:
        published = {
            "PRC + IR + IOS": f"{dataset.paper['miou']} (share {dataset.paper['share_of_supervised']})",
            "fully supervised": f"{dataset.paper['supervised']} (implied)",
        }
    title = f"{constants.table}: {dataset.title}"
    if process_state().is_main_process:
        note = caption(constants, dataset)
        print(write_table(folder / constants.table, title, note, lines, constants.seeds, published))
        print(f"written to {folder}")


def show_limits(runner: Runner, experiments: dict[str, str], background: bool, put: Callable) -> None:
    """What one part could give if another were perfect: IOS by the truth's regions, CAMs on the truth's background."""
    steps = [("pseudo_labels", "refined_pseudo_labels", generate_refined_pseudo)]
    if runner.constants.segment:
        steps.append(("segmentation", "refined_segmentation", generate_refined_seg))
    for stage, refined, step in steps:
        (value,) = runner.ios(experiments[WHOLE], stage, (step.Constants().tau,), perfect=True)
        put(f"{WHOLE}, IOS by perfect regions {TRUTH}", STAGES[refined], value)
    for row in rows_of(runner.constants) if background else []:
        put(row.name, f"CAM on the true background {TRUTH}", runner.true_background(experiments[row.name]))


def sweep_tau(runner: Runner, experiment: str, row: Row, put: Callable) -> None:
    """IOS of both stages with each tau, with the masks of step 9 and with the truth's regions."""
    plain, taus = runner.scores(experiment), runner.constants.taus
    for stage in ("pseudo_labels", "segmentation") if row.segment else ("pseudo_labels",):
        for perfect, masks in ((False, "refined"), (True, "by perfect regions")):
            column = f"{stage.replace('_', '-')} {masks}" + f" {TRUTH}" * perfect
            put("without IOS", column, plain[stage])
            for tau, value in zip(taus, runner.ios(experiment, stage, taus, perfect), strict=True):
                put(f"tau {tau:g}", column, value)


def caption(constants: Constants, dataset: Dataset) -> str:
    """What the numbers rest on: protocol, splits, seeds, all constants that are not the defaults, stand-ins."""
    parts = {"Classification": constants.classification, "Pseudo-labels": constants.pseudo}
    if any(row.segment for row in rows_of(constants)):
        parts["Segmentation"] = constants.segmentation
    notes = require(dataset.sam_masks("train")).get("notes", {})
    settings = [f"{name}: {said}." for name, part in parts.items() if (said := _told(part))]
    stand_in = [f"Stand-in: {notes['stand_in']}."] if "stand_in" in notes else []
    return " ".join(
        [
            f"mIoU in per cent: CAM, CRF and IOS on the train split, segmentation on the test split. Protocol: "
            f"{constants.protocol}. Seeds: {', '.join(map(str, constants.seeds))}. Scales: "
            f"{', '.join(f'{scale:g}' for scale in constants.scales)}.",
            *settings,
            *stand_in,
        ]
    )


def _told(part) -> str:
    """The backbone, its weights and the epochs always, other constants where they differ from the defaults."""
    usual = vars(type(part)())
    return ", ".join(
        f"{key} {Path(value).name if key == 'weights' else value}"
        for key, value in vars(part).items()
        if key not in SHARED | NOT_SETTINGS and (value != usual[key] or key in ("backbone", "weights", "epochs"))
    )


if __name__ == "__main__":
    run(main, Constants, __doc__)
