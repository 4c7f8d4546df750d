"""reproduce_tables.py on tiny data: rows, resuming, the oracle, the label-free background."""

import csv
from typing import get_args

import numpy as np
import pytest
import tyro

from make_pseudo_labels import thresholded_background
from reproduce_tables import Constants, check_constants, main, rows_of
from tables.oracles import PERFECT, STEP_9
from tables.table import show
from tests.steps import TRAIN, step
from tools.command import UserError
from tools.dataset import load_dataset
from tools.description import Method
from tools.labels import load_label
from tools.map_files import load_maps
from tools.scores import ConfusionMatrix
from train_classification import Constants as Classification

TRAINING = [
    *("--classification.backbone", "resnet18", "--classification.weights", "none", "--classification.train-all"),
    *("--classification.epochs", 1, "--classification.batch-size", 4, "--classification.lr", 0.003),
    *("--precision", "fp32", "--segmentation.width", 8),
    *("--segmentation.backbone", "resnet18", "--segmentation.weights", "none", "--segmentation.no-freeze-norm"),
    *("--segmentation.epochs", 1, "--segmentation.batch-size", 4, "--workers", 0, "--images-at-once", 4),
]


def table(root, *arguments) -> None:
    """reproduce_tables.py in this process, which has torch loaded already."""
    words = map(str, ["--dataset", "tiny", "--root", root, *TRAINING, *arguments])
    main(tyro.cli(Constants, args=list(words)))


def read(file) -> dict[tuple[str, str], list[float]]:
    with open(file, newline="") as lines:
        return {(row[0], row[1]): [float(value) for value in row[2:]] for row in list(csv.reader(lines))[1:]}


def test_tables_of_tiny_data(copy, run_script):
    first = run_script("reproduce_tables.py", "--table", "ablation", "--dataset", "tiny", "--root", copy, *TRAINING)
    folder = copy / "experiments" / "tiny"
    ablation = read(folder / "tables" / "ablation.csv")
    perfect = f"+ PRC + IR, IOS by {PERFECT}"
    assert {row for row, _ in ablation} == {"CAM", "+ PRC", "+ IR", "+ PRC + IR", perfect}
    assert sum(column == "segmentation" for _, column in ablation) == 2  # the first row and the last
    assert not (folder / "tables-ir_weight0-seed0" / "classifier").exists()  # without IR, PRC does not change training
    assert "felzenszwalb" in first.stdout and "clean" in first.stdout and "not published" in first.stdout
    assert (folder / "tables" / "ablation.png").stat().st_size > 1000

    model = folder / "tables-seed0" / "classifier" / "model.pt"
    written = model.stat().st_mtime_ns
    table(copy, "--table", "tau", "--taus", 0.1, 0.9)
    assert model.stat().st_mtime_ns == written  # the row of the ablation serves this table too
    tau = read(folder / "tables" / "tau.csv")
    # tau 0.9 is what steps 4 and 7 used
    for stage, column in (("pseudo-labels", "+ IOS"), ("segmentation", "segmentation + IOS")):
        assert tau["tau 0.9", f"{stage}, {STEP_9}"] == ablation["+ PRC + IR", column]
        assert tau["tau 0.9", f"{stage}, {PERFECT}"] == ablation[perfect, column]


def test_refinement_rules_equal_the_steps(copy, capsys):
    """Every rule on both stages, with the masks of step 9 and with perfect regions; steps 4 and 7 give the same."""
    table(copy, "--table", "refinement")
    printed, folder = capsys.readouterr().out, copy / "experiments" / "tiny"
    values = read(folder / "tables" / "refinement.csv")
    assert len(values) == 5 * 4 and {row for row, _ in values} == {"not refined", "ios", "sepl", "vote", "mean_cam"}
    assert "tau of IOS: 0.9 on pseudo-labels, 0.9 on segmentation" in printed and "everywhere has" in printed
    for stage, script, split in (
        ("pseudo-labels", "generate_refined_pseudo", "train"),
        ("segmentation", "generate_refined_seg", "test"),
    ):
        refined = folder / "tables-seed0" / f"refined_{stage.replace('-', '_')}"
        for rule in ("ios", "mean_cam"):
            step(script, copy, experiment="tables-seed0", rule=rule, overwrite=True)
            matrix = ConfusionMatrix(3)
            for file in (copy / "datasets" / "tiny" / split / "labels").glob("*.png"):
                matrix.update(load_label(file, 3), load_label(refined / file.name, 3))
            (value,) = values[rule, f"{stage}, {STEP_9}"]
            assert value == pytest.approx(100 * matrix.scores()["miou"], abs=1e-3), (stage, rule)


def test_background_rows_and_their_oracle(copy):
    """Where there is a background class: the extension's row, and the classes told apart on the true background."""
    toml = copy / "datasets" / "tiny" / "dataset.toml"
    toml.write_text(toml.read_text() + '\n[rules]\nbackground = "ground"\n')
    table(copy, "--table", "ablation", "--no-segment")
    folder = copy / "experiments" / "tiny"
    ablation = read(folder / "tables" / "ablation.csv")
    assert not any(column.startswith("segmentation") for _, column in ablation)
    assert ("+ PRC + IR, background by threshold (extension)", "+ CRF") in ablation
    assert not (folder / "tables-backgroundthreshold-seed0" / "cams").exists()  # step 3 takes those of tables-seed0

    oracle = ConfusionMatrix(3)
    for id in TRAIN:
        classes, maps = load_maps(folder / "tables-seed0" / "cams" / f"{id}.npz", 3, (64, 64))
        truth = load_label(copy / "datasets" / "tiny" / "train" / "labels" / f"{id}.png", 3)
        expected = np.zeros_like(truth)
        for y, x in np.argwhere(truth != 0):
            expected[y, x] = max((k for k in classes if k), key=lambda k: maps[list(classes).index(k), y, x])
        oracle.update(truth, expected)
    column = "CAM on the true background (USES THE TRUTH)"
    rows = [row for row, name in ablation if name == column]
    assert rows == ["CAM", "+ PRC", "+ IR", "+ PRC + IR"]  # not the extension, whose CAMs are the last's
    (value,) = ablation["+ PRC + IR", column]
    assert value == pytest.approx(100 * oracle.scores()["miou"], abs=1e-3)


def test_every_table_has_rows_and_the_default_is_among_them():
    defaults = vars(Classification()) | {"gamma": Method().gamma}
    for table in get_args(Constants.__annotations__["table"]):
        assert any(row.changes.items() <= defaults.items() for row in rows_of(Constants(table=table)))


@pytest.mark.parametrize(
    ("constants", "sentence"),
    [
        ({"classification": {"seed": 3}}, r"classification\.seed"),
        ({"classification": {"weights": "no/file"}}, "no/file is missing"),
        ({"pseudo": {"cams": "other"}}, r"pseudo\.cams"),
        ({"pseudo": {"background": "threshold"}}, "no background class"),
        ({"pseudo": {"background": "threshold"}, "table": "ablation"}, r"pseudo\.background"),
        ({"segmentation": {"batch_size": 99}}, "10 training patches"),
        ({"segment": False}, "segment is False"),
        ({"seeds": (1, 1)}, r"seeds is \(1, 1\)"),
        ({"gammas": ()}, r"gammas is \(\)"),
        ({"table": "gamma", "gammas": (0.7, 1.5)}, r"gammas is 1\.5"),
        ({"table": "lambda", "ir_weights": (0.1, -1.0)}, r"ir_weights is -1"),
        ({"table": "tiles", "tiles": (4, 5)}, "tiles is 5"),
        ({"table": "tau", "taus": (0.1, 3.0)}, r"taus is 3"),
    ],
)
def test_constants_are_checked_before_the_first_row(tmp_path, make_tiny_dataset, constants, sentence):
    """Not when a later row, or a later step, comes to them after hours."""
    make_tiny_dataset(tmp_path)
    training = {"classification": {"weights": "none", "train_all": True}}
    with pytest.raises(UserError, match=sentence):
        check_constants(Constants(**training | constants), load_dataset("tiny", tmp_path))


def test_the_two_protocols_stand_beside_each_other(copy, capsys):
    """The released one chooses the epoch by the maps, so "+ PRC" needs a training of its own there."""
    common, folder = ["--table", "lambda", "--ir-weights", 0.0], copy / "experiments" / "tiny"
    for protocol, suffix in (("clean", ""), ("released", "-released")):
        table(copy, *common, "--protocol", protocol)
        printed = capsys.readouterr().out
        assert f"Protocol: {protocol}." in printed and "epochs 1, batch_size 4" in printed
        assert (folder / f"tables{suffix}" / "lambda.csv").exists()
    assert not (folder / "tables-ir_weight0-seed0" / "classifier").exists()
    assert (folder / "tables-released-ir_weight0-seed0" / "classifier" / "model.pt").exists()
    with pytest.raises(UserError, match="choose another --experiment"):
        table(copy, *common, "--classification.lr", 0.001)
    table(copy, *common, "--classification.lr", 0.001, "--experiment", "slow")
    assert (folder / "slow" / "lambda.md").exists()


def test_spread_is_the_standard_deviation_over_seeds():
    assert show([]) == "" and show([3.0]) == "3.00" and show([1.0, 3.0]) == "2.00 ± 1.41"


def test_thresholded_background_is_one_value_between_the_other_classes():
    maps = np.zeros((3, 4, 4), np.float32)
    maps[0], maps[1, :2], maps[2, 2:] = 0.9, 0.8, 0.1
    thresholded = thresholded_background(np.array([0, 2, 5]), maps, 0)
    assert (thresholded[1:] == maps[1:]).all() and np.unique(thresholded[0]).size == 1
    assert 0.1 <= thresholded[0, 0, 0] < 0.8  # the strong class beats it, the weak one does not
    alone = thresholded_background(np.array([0]), maps[:1], 0)
    assert (alone == maps[:1]).all()  # nothing but background: left as it is
