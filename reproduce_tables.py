"""Run the steps for every row of one of the paper's tables and print it.

Reads  datasets/<dataset> with its SAM masks (process.py and step 9 done)
Writes experiments/<dataset>/tables-*/ (one experiment for each setting and seed, shared by the tables) and
       experiments/<dataset>/tables/<table>.md, .csv and .png

    python reproduce_tables.py --table ablation --dataset vaihingen --seeds 0 1 2

Rows that are there already are not run again; a stopped table continues with the same command. Constants of the two
trainings are set by --classification.<constant> and --segmentation.<constant>.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

import evaluate_miou
import generate_refined_pseudo
import generate_refined_seg
import infer_classification
import inference_segmentation
import make_pseudo_labels
import train_classification
import train_segmentation
from PRC_SAM.oracles import on_true_background, refined_by_ios
from tools.command import check, run
from tools.dataset import Dataset, load_dataset
from tools.folders import ROOT, experiment_folder, process_state, require
from tools.scores import ConfusionMatrix
from tools.tables import Lines, write_table


@dataclass(frozen=True)
class Constants:
    table: Literal["main", "ablation", "gamma", "lambda", "tiles", "tau"] = "main"  # which of the tables
    dataset: str = "vaihingen"  # vaihingen | potsdam | isaid | demo | the name of your own dataset.toml
    seeds: tuple[int, ...] = (0,)  # with several, the table shows mean and standard deviation
    protocol: Literal["clean", "released"] = "clean"  # as in steps 1, 5, 7 and 8
    segment: bool = True  # False leaves the segmentation columns of the ablation empty, and saves steps 5 to 7
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


@dataclass(frozen=True)
class Row:
    """One line of a table: what it changes in steps 1 and 3, and whether a segmenter is trained as well."""

    name: str
    changes: dict = field(default_factory=dict)
    pseudo: dict = field(default_factory=dict)
    segment: bool = False


WHOLE = "+ PRC + IR"  # the ablation's row of the whole method


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
        "tau": [Row("", segment=True)],
    }[constants.table]


STAGES = {  # stage -> column
    "cams": "CAM",
    "pseudo_labels": "+ CRF",
    "refined_pseudo_labels": "+ IOS",
    "segmentation": "segmentation",
    "refined_segmentation": "segmentation + IOS",
}


SHARED = ("dataset", "experiment", "split", "protocol", "seed", "labels", "precision", "workers", "root", "overwrite")


def check_constants(constants: Constants) -> None:
    """What the steps share is set once: a value in one of the parts would be overruled in silence."""
    check(
        len(set(constants.seeds)) == len(constants.seeds) > 0,
        f"seeds is {constants.seeds}, but needs different numbers",
    )
    check(
        constants.segment or constants.table == "ablation",
        f"segment is False, but only the ablation can do without segmentation, not the table {constants.table}",
    )
    for name in ("classification", "segmentation", "pseudo"):
        part = getattr(constants, name)
        for key in SHARED:
            check(
                getattr(part, key, None) == getattr(type(part)(), key, None),
                f"{name}.{key} was set, but the tables set it themselves: leave it, or set {key} where there is one",
            )


class Runner:
    """Runs the steps of one seed in an experiment of its own and reads their scores."""

    def __init__(self, constants: Constants, dataset: Dataset, seed: int):
        self.constants, self.dataset, self.seed = constants, dataset, seed

    def step(self, module, experiment: str, start=None, **changes) -> None:
        """Call a step's main with the constants that it shares with this script."""
        given = {
            "dataset": self.dataset.name,
            "experiment": experiment,
            "seed": self.seed,
            "root": self.constants.root,
            "protocol": self.constants.protocol,
            "precision": self.constants.precision,
            "workers": self.constants.workers,
            "images_at_once": self.constants.images_at_once,
            "scales": self.constants.scales,
            **changes,
        }
        start = start or module.Constants()
        module.main(replace(start, **{key: value for key, value in given.items() if hasattr(start, key)}))

    def pseudo_labels(self, row: Row) -> str:
        """Steps 1 to 4 of a row -> its experiment. Rows whose changes are the defaults share the plain experiment."""
        base = self.constants.classification
        trained, applied = row.changes, {}
        settings = {"ir_weight": base.ir_weight, "iterations": base.iterations, **row.changes}
        if settings["ir_weight"] == 0 and settings["iterations"] > 0:
            # The logits come from the raw maps, so without IR no gradient reaches PRC, nor anything through it: the
            # classifier is the one trained without PRC, and PRC is put on its maps in step 2.
            trained, applied = {"iterations": 0, **row.changes}, {"iterations": settings["iterations"]}
        classifier, cams = self.experiment(trained), self.experiment(row.changes)
        experiment = self.experiment(row.changes | row.pseudo)
        self.step(train_classification, classifier, base, **trained)
        self.step(infer_classification, cams, classifier="" if classifier == cams else classifier, **applied)
        source = "" if cams == experiment else cams
        self.step(make_pseudo_labels, experiment, self.constants.pseudo, cams=source, **row.pseudo)
        self.step(generate_refined_pseudo, experiment)
        return experiment

    def experiment(self, changes: dict) -> str:
        """The name for settings that differ so from those given for steps 1 and 3."""
        usual = vars(self.constants.pseudo) | vars(self.constants.classification)
        parts = [
            f"{key}{value}" if isinstance(value, str) else f"{key}{value:g}"
            for key, value in changes.items()
            if usual[key] != value
        ]
        return "-".join(["tables", *parts, f"seed{self.seed}"])

    def segmentation(self, experiment: str) -> None:
        """Steps 5 to 7."""
        self.step(train_segmentation, experiment, self.constants.segmentation)
        self.step(inference_segmentation, experiment)
        self.step(generate_refined_seg, experiment)

    def supervised(self) -> str:
        """The fully supervised bound -> its experiment."""
        experiment = f"tables-supervised-seed{self.seed}"
        self.step(train_segmentation, experiment, self.constants.segmentation, labels="truth")
        self.step(inference_segmentation, experiment)
        return experiment

    def scores(self, experiment: str) -> dict[str, float]:
        """Stage -> headline mIoU in per cent, of every label folder of an experiment."""
        constants = evaluate_miou.Constants(
            self.dataset.name, experiment, supervised=experiment, protocol=self.constants.protocol,
            workers=self.constants.workers, root=self.constants.root,
        )  # fmt: skip
        folder = experiment_folder(constants.root, constants.dataset, experiment)
        stages = evaluate_miou.find_stages(self.dataset, folder, constants)
        failures = [
            line
            for split in ("train", "test")
            for line in evaluate_miou.score(self.dataset, split, [s for s in stages if s.split == split], constants)
        ]
        check(not failures, f"{len(failures)} files of {folder} could not be scored, {failures[0] if failures else ''}")
        return {stage.name: self.headline(stage.matrix) for stage in stages}

    def headline(self, matrix: ConfusionMatrix) -> float:
        return 100 * matrix.scores(np.flatnonzero(~self.dataset.scored), self.constants.protocol)["miou"]

    def ios(self, experiment: str, stage: str, split: str, taus: tuple[float, ...], perfect=False) -> list[float]:
        """mIoU of a label folder after IOS with each tau; `perfect` takes the truth's connected components as masks."""
        folder = experiment_folder(self.constants.root, self.dataset.name, experiment) / stage
        from_image = split == "train" or self.constants.protocol == "released"
        return [
            self.headline(matrix) for matrix in refined_by_ios(self.dataset, folder, split, taus, from_image, perfect)
        ]

    def true_background(self, experiment: str, background: int) -> float:
        """mIoU of the CAMs' argmax with the truth's background."""
        folder = experiment_folder(self.constants.root, self.dataset.name, experiment) / "cams"
        return self.headline(on_true_background(self.dataset, folder, background))


def main(constants: Constants) -> None:
    check_constants(constants)
    dataset = load_dataset(constants.dataset, constants.root)
    for split in ("train", "test"):
        dataset.image_labels(split)
        require(dataset.sam_masks(split))
    background = dataset.rules.get("background")
    lines: Lines = {}

    def put(row: str, column: str, value: float) -> None:
        lines.setdefault(row, {}).setdefault(column, []).append(value)

    for seed in constants.seeds:
        runner = Runner(constants, dataset, seed)
        experiments, found = {}, {}
        for row in rows_of(constants, background in dataset.classes):
            experiments[row.name] = experiment = runner.pseudo_labels(row)
            if row.segment:
                runner.segmentation(experiment)
            if constants.table == "tau":
                sweep_tau(runner, experiment, put)
                continue
            found = runner.scores(experiment)
            for stage, column in STAGES.items():
                if stage in found and (row.segment or stage not in ("segmentation", "refined_segmentation")):
                    put(row.name, column, found[stage])
        if constants.table == "ablation":
            oracle = f"{WHOLE}, {{}} (USES THE TRUTH)"
            tau = generate_refined_pseudo.Constants().tau
            (value,) = runner.ios(experiments[WHOLE], "pseudo_labels", "train", (tau,), perfect=True)
            put(oracle.format("IOS with perfect regions"), STAGES["refined_pseudo_labels"], value)
            if background in dataset.classes:
                value = runner.true_background(experiments[WHOLE], dataset.classes.index(background))
                put(oracle.format("the true background"), STAGES["cams"], value)
        if constants.table == "main":
            bound = runner.scores(runner.supervised())["segmentation"]
            put("fully supervised", STAGES["segmentation"], bound)
            put(row.name, "share of fully supervised", 100 * found["refined_segmentation"] / bound)
    paper = dataset.paper if constants.table == "main" else {}
    published = {}
    if "miou" in paper:
        published = {
            "PRC + IR + IOS": f"{paper['miou']} (share {paper['share_of_supervised']})",
            "fully supervised": paper["supervised"],
        }
    folder = Path(constants.root) / "experiments" / dataset.name / "tables"
    title = f"{constants.table}: {dataset.title}"
    if process_state().is_main_process:
        note = caption(constants, dataset)
        print(write_table(folder / constants.table, title, note, lines, constants.seeds, published))
        print(f"written to {folder}")


def sweep_tau(runner: Runner, experiment: str, put: Callable[[str, str, float], None]) -> None:
    for stage, split, column in (
        ("pseudo_labels", "train", "refined pseudo-labels"),
        ("segmentation", "test", "refined segmentation"),
    ):
        plain = runner.scores(experiment)[stage]
        put("without IOS", column, plain)
        for tau, value in zip(
            runner.constants.taus, runner.ios(experiment, stage, split, runner.constants.taus), strict=True
        ):
            put(f"tau {tau:g}", column, value)


def caption(constants: Constants, dataset: Dataset) -> str:
    """What the numbers rest on: protocol, splits, seeds, backbone, stand-ins."""
    notes = require(dataset.sam_masks("train")).get("notes", {})
    stand_in = f" Stand-in: {notes['stand_in']}." if "stand_in" in notes else ""
    step1, step5 = constants.classification, constants.segmentation
    text = (
        f"mIoU in per cent. Protocol: {constants.protocol}. CAM, CRF and IOS columns on the train split. Seeds: "
        f"{', '.join(map(str, constants.seeds))}. Classifier: {step1.backbone}, weights {Path(step1.weights).name}, "
        f"{step1.epochs} epochs."
    )
    if any(row.segment for row in rows_of(constants)):
        text += f" Segmentation on the test split: {step5.backbone}, {step5.epochs} epochs."
    return text + stand_in


if __name__ == "__main__":
    run(main, Constants, __doc__)
