"""The steps run for the rows of the tables, and the scores of their results."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

import evaluate_miou
import generate_refined_pseudo
import generate_refined_seg
import infer_classification
import inference_segmentation
import make_pseudo_labels
import train_classification
import train_segmentation
from PRC_SAM.refine import Refinement
from report.page import renew
from report.summary import constant_map
from tables.oracles import refined
from tools.command import check
from tools.dataset import Dataset
from tools.devices import process_state
from tools.scores import ConfusionMatrix
from tools.step import experiment_folder

Changes = dict[str, Any]  # constant -> value


@dataclass(frozen=True)
class Row:
    """One line of a table: what it changes, and whether a segmenter is trained as well."""

    name: str
    changes: Changes = field(default_factory=dict)  # constants of step 1
    pseudo: Changes = field(default_factory=dict)  # constants of step 3
    segment: bool = False


class Runner:
    """Runs the steps of one seed in experiments called <prefix>-<what differs>-seed<seed>, and reads their scores.

    `args` are the constants of reproduce_tables.py. `constant_maps`: split -> what the most frequent class everywhere
    reaches, as a sentence.
    """

    def __init__(self, args: Any, dataset: Dataset, prefix: str, seed: int):
        self.args, self.dataset, self.prefix, self.seed = args, dataset, prefix, seed
        self.constant_maps: dict[str, str] = {}

    def constants(self, base: Any, experiment: str, **changes: Any) -> Any:
        """`base`, a step's constants, with `changes` and with those that the step shares with reproduce_tables.py."""
        shared = ("root", "protocol", "precision", "device", "workers", "images_at_once", "scales")
        values = {name: getattr(self.args, name) for name in shared}
        values |= {"dataset": self.dataset.name, "experiment": experiment, "seed": self.seed} | changes
        return replace(base, **{name: value for name, value in values.items() if hasattr(base, name)})

    def step(self, module: ModuleType, experiment: str, base: Any = None, **changes: Any) -> None:
        """Call a step's main and renew the report. Its constants are `base`, or the step's own, with `changes`."""
        args = self.constants(base or module.Constants(), experiment, **changes)
        module.main(args)
        if process_state(self.args.device).is_main_process:
            renew(args)

    def run(self, row: Row) -> str:
        """Steps 1 to 4 of a row, or 1 to 7 -> its experiment: the plain one where the changes are the defaults."""
        base = self.args.classification
        trained, applied = row.changes, {}
        iterations = row.changes.get("iterations", base.iterations)
        if row.changes.get("ir_weight", base.ir_weight) == 0 and iterations > 0 and self.args.protocol == "clean":
            # The logits come from the raw maps, so without IR no gradient reaches PRC: the classifier is the one that
            # was trained without PRC, and step 2 applies PRC to its maps. Under the released protocol the maps choose
            # the epoch, so that PRC can change the classifier.
            trained, applied = {"iterations": 0, **row.changes}, {"iterations": iterations}
        classifier, cams = self.experiment(trained), self.experiment(row.changes)
        experiment = self.experiment(row.changes | row.pseudo)
        self.step(train_classification, classifier, base, **trained)
        self.step(infer_classification, cams, classifier="" if classifier == cams else classifier, **applied)
        source = "" if cams == experiment else cams
        self.step(make_pseudo_labels, experiment, self.args.pseudo, cams=source, **row.pseudo)
        self.step(generate_refined_pseudo, experiment)
        if row.segment:
            self.step(train_segmentation, experiment, self.args.segmentation)
            self.step(inference_segmentation, experiment, keep_probabilities=self.args.table == "refinement")
            self.step(generate_refined_seg, experiment)
        return experiment

    def experiment(self, changes: Changes) -> str:
        """The name of the experiment in which these constants of steps 1 and 3 differ from the given ones."""
        defaults = vars(self.args.pseudo) | vars(self.args.classification)
        defaults["gamma"], _ = self.dataset.method_value("gamma", defaults["gamma"])
        parts = [self.prefix]
        for name, value in changes.items():
            if value != defaults[name]:
                parts.append(f"{name}{value}" if isinstance(value, str) else f"{name}{value:g}")
        return "-".join([*parts, f"seed{self.seed}"])

    def supervised(self) -> str:
        """The fully supervised bound -> its experiment."""
        experiment = f"{self.prefix}-supervised-seed{self.seed}"
        self.step(train_segmentation, experiment, self.args.segmentation, labels="truth")
        self.step(inference_segmentation, experiment)
        return experiment

    def folder(self, experiment: str) -> Path:
        return experiment_folder(self.args.root, self.dataset.name, experiment)

    def scores(self, experiment: str) -> dict[str, float]:
        """Stage -> headline mIoU in per cent, of every label folder of an experiment."""
        args = self.constants(evaluate_miou.Constants(), experiment, supervised=experiment)
        stages = evaluate_miou.find_stages(self.dataset, self.folder(experiment), args)
        failures = evaluate_miou.score(self.dataset, stages, args)
        check(not failures, f"{len(failures)} files of {experiment} could not be scored: {failures[:1]}")
        for stage in stages:
            k, matrix = constant_map(stage.matrix, self.dataset.scored)
            miou, name = self.headline(matrix), self.dataset.classes[k]
            self.constant_maps[stage.split] = f"{name} everywhere has {miou:.2f} on the {stage.split} split"
        return {stage.path.name: self.headline(stage.matrix) for stage in stages}

    def headline(self, matrix: ConfusionMatrix) -> float:
        """mIoU in per cent."""
        return 100 * matrix.scores(np.flatnonzero(~self.dataset.scored), self.args.protocol)["miou"]

    def refined(self, experiment: str, stage: str, rules: Sequence[Refinement]) -> dict[str, list[float]]:
        """mIoU of pseudo_labels or segmentation after each rule, by the masks of step 9 and by the truth's regions."""
        from_image = stage == "pseudo_labels" or self.args.protocol == "released"
        matrices = refined(self.dataset, self.folder(experiment) / stage, rules, from_image, self.args.workers)
        return {masks: [self.headline(matrix) for matrix in of_rules] for masks, of_rules in matrices.items()}
