"""Run the steps for every row of one of the paper's tables, and print the table.

Reads  datasets/<dataset> with its SAM masks (process.py and step 9 done)
Writes experiments/<dataset>/tables-*/ (one experiment for each setting and seed, shared by the tables) and
       experiments/<dataset>/tables/<table>.md, .csv and .png; all of them tables-released* under the released protocol

    python reproduce_tables.py --table ablation --dataset vaihingen --seeds 0 1 2

Finished rows are not run again; a stopped table continues with the same command. The constants of steps 1, 3 and 5 are
set by --classification.<constant>, --pseudo.<constant> and --segmentation.<constant>, such as --pseudo.crf-iterations.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import make_pseudo_labels
import train_classification
import train_segmentation
from PRC_SAM.refine import Refinement, Rule
from tables.oracles import PERFECT, on_true_background
from tables.runner import Row, Runner
from tables.table import SHARE, Table, write_table
from tools.command import check, run
from tools.constants import (
    ROOT,
    WORKERS,
    Affinity,
    Count,
    Device,
    NonNegative,
    PositiveCount,
    Scales,
    Seed,
    Share,
    checked_constants,
    may_change,
)
from tools.dataset import Dataset, load_dataset
from tools.devices import process_state
from tools.runs import Run
from tools.step import experiment_folder, require
from tools.steps import SPLITS


@checked_constants
class Constants:
    table: Literal["main", "ablation", "gamma", "lambda", "tiles", "tau", "refinement"] = "main"  # which of the tables
    dataset: str = "vaihingen"  # vaihingen | potsdam | isaid | demo | the name of your own dataset.toml
    experiment: str = "tables"  # how the names of its folders begin: choose another one for other constants
    seeds: tuple[Seed, ...] = (0,)  # with several, the table shows mean and standard deviation
    protocol: Literal["clean", "released"] = "clean"  # as in steps 1, 5, 7 and 8
    segment: bool = True  # False saves steps 5 to 7 in the tables ablation, tau and refinement
    gammas: tuple[Affinity, ...] = (0.5, 0.6, 0.7, 0.8, 0.9)  # of the table gamma
    ir_weights: tuple[NonNegative, ...] = (0.0, 0.05, 0.1, 0.2, 0.4)  # of the table lambda
    tiles: tuple[PositiveCount, ...] = (1, 4, 16)  # of the table tiles
    taus: tuple[Share, ...] = (0.1, 0.3, 0.5, 0.7, 0.8, 0.85, 0.9, 0.95)  # of the table tau
    classification: train_classification.Constants = train_classification.Constants()  # step 1
    pseudo: make_pseudo_labels.Constants = make_pseudo_labels.Constants()  # step 3
    segmentation: train_segmentation.Constants = train_segmentation.Constants()  # step 5
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # bf16 where GPU or CPU compute in it, else fp32
    scales: Scales = (0.5, 1.0, 1.5, 2.0)  # of the inference steps
    images_at_once: PositiveCount = 8  # patches of one batch of the inference steps
    device: Device = "auto"  # auto | cpu | cuda | cuda:1 | mps
    workers: Count = WORKERS  # processes that read and write
    root: Path = ROOT  # the folder that holds datasets/ and experiments/


METHOD = "+ PRC + IR"  # the ablation's row of the complete method
STAGES = {  # folder -> column
    "cams": "CAM",
    "pseudo_labels": "+ CRF",
    "refined_pseudo_labels": "+ IOS",
    "segmentation": "segmentation",
    "refined_segmentation": "segmentation + IOS",
}
# constants that the tables set themselves
SHARED = {"dataset", "experiment", "split", "protocol", "seed", "labels", "cams", "precision", "device", "workers",
          "root", "overwrite"}  # fmt: skip


def rows_of(args: Constants, background: bool = False) -> list[Row]:
    """The rows of a table; `background`: the data set has a background class."""
    segment = args.segment
    rows = {
        "main": [Row("PRC + IR + IOS", segment=True)],
        "ablation": [
            Row("CAM", {"iterations": 0, "ir_weight": 0.0}, segment=segment),
            Row("+ PRC", {"ir_weight": 0.0}),
            Row("+ IR", {"iterations": 0}),
            Row(METHOD, segment=segment),
        ],
        "gamma": [Row(f"gamma {value:g}", {"gamma": value}) for value in args.gammas],
        "lambda": [Row(f"lambda {value:g}", {"ir_weight": value}) for value in args.ir_weights],
        "tiles": [Row(f"{value} tiles", {"tiles": value}) for value in args.tiles],
        "tau": [Row("", segment=segment)],
        "refinement": [Row("", segment=segment)],
    }[args.table]
    if args.table == "ablation" and background:
        rows.append(Row(f"{METHOD}, background by threshold (extension)", pseudo={"background": "threshold"}))
    return rows


def check_constants(args: Constants, dataset: Dataset) -> None:
    """Raise `UserError` for constants that would stop a later row, or a later step of a row, after hours."""
    for name in ("seeds", "gammas", "ir_weights", "tiles", "taus"):
        values = getattr(args, name)
        check(len(set(values)) == len(values) > 0, f"{name} is {values}, but it must hold different numbers")
    check(args.segment or args.table != "main", "segment is False, but the table main is about segmentation")
    for name in ("classification", "pseudo", "segmentation"):
        constants = getattr(args, name)
        values, defaults = vars(constants), vars(type(constants)())
        for key in sorted(SHARED & values.keys()):
            check(
                values[key] == defaults[key],
                f"{name}.{key} was set, but the tables set it themselves: remove it, or set {key} where it exists",
            )
    check(
        args.table != "ablation" or args.pseudo.background == "cam",
        "pseudo.background is threshold, but the ablation has a row of its own for it: remove it",
    )
    make_pseudo_labels.check_constants(args.pseudo, dataset)
    for row in rows_of(args):
        train_classification.check_constants(replace(args.classification, **row.changes), dataset)
        if row.segment:
            train_segmentation.check_constants(args.segmentation, dataset)


def main(args: Constants) -> None:
    dataset = load_dataset(args.dataset, args.root)
    check_constants(args, dataset)
    masks = {}
    for split in SPLITS:
        dataset.image_labels(split)  # missing or damaged labels stop the first step, not a later one after hours
        masks[split] = require(dataset.sam_masks(split), args)
    prefix = args.experiment + ("-released" if args.protocol == "released" else "")
    folder = experiment_folder(args.root, dataset.name, prefix)
    runners = [Runner(args, dataset, prefix, seed) for seed in args.seeds]
    table = Table()
    for runner in runners:
        fill(table, runner)
    published = {}
    if args.table == "main" and dataset.paper:
        published = {
            "PRC + IR + IOS": f"{dataset.paper['miou']} (share {dataset.paper['share_of_supervised']})",
            "fully supervised": f"{dataset.paper['supervised']} (implied)",
        }
    if process_state(args.device).is_main_process:
        note = caption(args, dataset, runners[0], masks["train"])
        print(write_table(folder / args.table, f"{args.table}: {dataset.title}", note, table, args.seeds, published))
        print(f"written to {folder}")


def fill(table: Table, runner: Runner) -> None:
    """Run the rows of one seed, and add their scores to the table."""
    experiments = {}
    for row in rows_of(runner.args, runner.dataset.background is not None):
        experiments[row.name] = experiment = runner.run(row)
        scores = runner.scores(experiment)
        if runner.args.table in ("tau", "refinement"):
            compare_rules(table, runner, row, experiment, scores)
        else:
            for stage, column in STAGES.items():
                if stage in scores and (row.segment or not stage.endswith("segmentation")):
                    table.add(row.name, column, scores[stage])
        if runner.args.table == "main":
            bound = runner.scores(runner.supervised())["segmentation"]
            table.add("fully supervised", STAGES["segmentation"], bound)
            table.add(row.name, SHARE, 100 * scores["refined_segmentation"] / bound)
    if runner.args.table == "ablation":
        show_limits(table, runner, experiments)


def show_limits(table: Table, runner: Runner, experiments: dict[str, str]) -> None:
    """What one part could give if another were perfect: IOS by the truth's regions, CAMs on the truth's background."""
    for stage in ("pseudo_labels", "segmentation") if runner.args.segment else ("pseudo_labels",):
        rules = [Refinement("ios", getattr(runner.dataset.method, f"tau_{stage}"), None)]
        values = runner.refined(experiments[METHOD], stage, rules)[PERFECT]
        table.add(f"{METHOD}, IOS by {PERFECT}", STAGES[f"refined_{stage}"], values[0])
    background = runner.dataset.background
    if background is not None:
        for row in rows_of(runner.args):
            cams = runner.folder(experiments[row.name]) / "cams"
            value = runner.headline(on_true_background(runner.dataset, cams, background))
            table.add(row.name, "CAM on the true background (USES THE TRUTH)", value)


def compare_rules(table: Table, runner: Runner, row: Row, experiment: str, scores: Mapping[str, float]) -> None:
    """IOS with each tau, or each refinement rule, on both stages: with the masks of step 9 and the truth's regions."""
    for stage in ("pseudo_labels", "segmentation") if row.segment else ("pseudo_labels",):
        if runner.args.table == "tau":
            rules = {f"tau {tau:g}": Refinement("ios", tau, None) for tau in runner.args.taus}
        else:
            tau = getattr(runner.dataset.method, f"tau_{stage}")
            rules = {rule: Refinement(rule, tau, runner.dataset.background) for rule in get_args(Rule)}
        for masks, values in runner.refined(experiment, stage, list(rules.values())).items():
            column = f"{stage.replace('_', '-')}, {masks}"
            table.add("not refined", column, scores[stage])
            for name, value in zip(rules, values, strict=True):
                table.add(name, column, value)


def caption(args: Constants, dataset: Dataset, runner: Runner, masks: Run) -> str:
    """What the numbers rest on: protocol, splits, seeds, all constants that are not the defaults, stand-ins."""
    steps = {"Classification": args.classification, "Pseudo-labels": args.pseudo}
    if any(row.segment for row in rows_of(args)):
        steps["Segmentation"] = args.segmentation
    method = dataset.method
    sentences = [
        "mIoU in per cent: CAM, CRF and refinement on the train split, segmentation on the test split.",
        f"Protocol: {args.protocol}. Seeds: {', '.join(map(str, args.seeds))}.",
        f"Scales: {', '.join(f'{scale:g}' for scale in args.scales)}.",
        f"tau of IOS: {method.tau_pseudo_labels:g} on pseudo-labels, {method.tau_segmentation:g} on segmentation.",
    ]
    for name, constants in steps.items():
        if text := describe(constants):
            sentences.append(f"{name}: {text}.")
    if runner.constant_maps:
        sentences.append(f"The most frequent class, {', and '.join(runner.constant_maps.values())}.")
    if "stand_in" in masks.notes:
        sentences.append(f"Stand-in: {masks.notes['stand_in']}.")
    return " ".join(sentences)


def describe(constants: Any) -> str:
    """The backbone, its weights and the epochs always, other constants where they differ from the defaults."""
    defaults = vars(type(constants)())
    parts = []
    for name, value in vars(constants).items():
        always = name in ("backbone", "weights", "epochs")
        if name not in SHARED | may_change(constants) and (always or value != defaults[name]):
            parts.append(f"{name} {Path(value).name if name == 'weights' else value}")
    return ", ".join(parts)


if __name__ == "__main__":
    run(main, Constants, __doc__)
