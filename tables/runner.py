"""The steps run for the rows of the paper's tables, and the scores of what they made."""

from dataclasses import dataclass, field, replace

import numpy as np

import evaluate_miou
import generate_refined_pseudo
import generate_refined_seg
import infer_classification
import inference_segmentation
import make_pseudo_labels
import train_classification
import train_segmentation
from tables.oracles import on_true_background, refined_by_ios
from tools.command import check
from tools.dataset import Dataset
from tools.scores import ConfusionMatrix
from tools.step import experiment_folder


@dataclass(frozen=True)
class Row:
    """One line of a table: what it changes in steps 1 and 3, and whether a segmenter is trained as well."""

    name: str
    changes: dict = field(default_factory=dict)
    pseudo: dict = field(default_factory=dict)
    segment: bool = False


class Runner:
    """Runs the steps of one seed in experiments called <prefix>-<what differs>-seed<seed>, and reads their scores.

    `constants` are those of reproduce_tables.py.
    """

    def __init__(self, constants, dataset: Dataset, prefix: str, seed: int):
        self.constants, self.dataset, self.prefix, self.seed = constants, dataset, prefix, seed

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
        if settings["ir_weight"] == 0 and settings["iterations"] > 0 and self.constants.protocol == "clean":
            # The logits come from the raw maps, so without IR no gradient reaches PRC, nor anything through it: the
            # classifier is the one trained without PRC, and PRC is put on its maps in step 2. Not where the epoch is
            # chosen by the maps (released): that may be another one with PRC.
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
        return "-".join([self.prefix, *parts, f"seed{self.seed}"])

    def segmentation(self, experiment: str) -> None:
        """Steps 5 to 7."""
        self.step(train_segmentation, experiment, self.constants.segmentation)
        self.step(inference_segmentation, experiment)
        self.step(generate_refined_seg, experiment)

    def supervised(self) -> str:
        """The fully supervised bound -> its experiment."""
        experiment = f"{self.prefix}-supervised-seed{self.seed}"
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

    def ios(self, experiment: str, stage: str, taus: tuple[float, ...], perfect: bool = False) -> list[float]:
        """mIoU of a label folder after IOS with each tau; `perfect` takes the truth's connected components as masks."""
        folder = experiment_folder(self.constants.root, self.dataset.name, experiment) / stage
        split = "test" if stage == "segmentation" else "train"
        from_image = split == "train" or self.constants.protocol == "released"
        return [
            self.headline(matrix) for matrix in refined_by_ios(self.dataset, folder, split, taus, from_image, perfect)
        ]

    def true_background(self, experiment: str) -> float:
        """mIoU of the CAMs' argmax with the truth's background."""
        folder = experiment_folder(self.constants.root, self.dataset.name, experiment) / "cams"
        assert self.dataset.background is not None, "asked for only where there is a background class"
        return self.headline(on_true_background(self.dataset, folder, self.dataset.background))
