"""reproduce_tables.py on tiny data: rows, resuming, the oracle, the label-free background."""

import csv
from dataclasses import replace

import numpy as np
import pytest

from make_pseudo_labels import Constants as Pseudo
from make_pseudo_labels import thresholded_background
from reproduce_tables import Constants, check_constants, rows_of
from tables.oracles import perfect_regions
from tables.runner import Row
from tables.table import show
from tests.steps import TRAIN
from tools.cams import load_cams
from tools.command import UserError
from tools.dataset import load_dataset
from tools.labels import load_label
from tools.scores import ConfusionMatrix
from train_classification import Constants as Classification
from train_segmentation import Constants as Segmentation

TRAINING = [
    *("--classification.backbone", "resnet18", "--classification.weights", "none", "--classification.train-all"),
    *("--classification.epochs", 1, "--classification.batch-size", 4, "--classification.lr", 0.003),
    *("--precision", "fp32", "--segmentation.width", 8),
    *("--segmentation.backbone", "resnet18", "--segmentation.weights", "none", "--segmentation.no-freeze-norm"),
    *("--segmentation.epochs", 1, "--segmentation.batch-size", 4, "--workers", 0, "--images-at-once", 4),
]


def read(file) -> dict[tuple[str, str], list[float]]:
    with open(file, newline="") as lines:
        return {(row[0], row[1]): [float(value) for value in row[2:]] for row in list(csv.reader(lines))[1:]}


def test_tables_of_tiny_data(copy, run_script):
    common = ["--dataset", "tiny", "--root", copy, *TRAINING]
    first = run_script("reproduce_tables.py", "--table", "ablation", *common)
    folder = copy / "experiments" / "tiny"
    ablation = read(folder / "tables" / "ablation.csv")
    assert {row for row, _ in ablation} >= {"CAM", "+ PRC", "+ IR", "+ PRC + IR"}
    assert sum(column == "segmentation" for _, column in ablation) == 2  # the first row and the last
    assert not (folder / "tables-ir_weight0-seed0" / "classifier").exists()  # without IR, PRC does not change training
    assert any("USES THE TRUTH" in row for row, _ in ablation)
    assert all(0 <= value <= 100 for values in ablation.values() for value in values)
    assert "felzenszwalb" in first.stdout and "clean" in first.stdout and "not published" in first.stdout
    assert (folder / "tables" / "ablation.png").stat().st_size > 1000

    model = folder / "tables-seed0" / "classifier" / "model.pt"
    written = model.stat().st_mtime_ns
    run_script("reproduce_tables.py", "--table", "tau", "--taus", 0.1, 0.9, *common)
    assert model.stat().st_mtime_ns == written  # the row of the ablation serves this table too
    tau = read(folder / "tables" / "tau.csv")
    # tau 0.9 and 0.1 are what steps 4 and 7 used
    assert tau["tau 0.9", "pseudo-labels refined"] == ablation["+ PRC + IR", "+ IOS"]
    assert tau["tau 0.1", "segmentation refined"] == ablation["+ PRC + IR", "segmentation + IOS"]
    perfect = "+ PRC + IR, IOS by perfect regions (USES THE TRUTH)"
    assert tau["tau 0.9", "pseudo-labels by perfect regions (USES THE TRUTH)"] == ablation[perfect, "+ IOS"]
    assert tau["tau 0.1", "segmentation by perfect regions (USES THE TRUTH)"] == ablation[perfect, "segmentation + IOS"]


def test_background_rows_and_their_oracle(copy, run_script):
    """Where there is a background class: the extension's row, and the classes told apart on the true background."""
    toml = copy / "datasets" / "tiny" / "dataset.toml"
    toml.write_text(toml.read_text() + '\n[rules]\nbackground = "ground"\n')
    run_script(
        "reproduce_tables.py", "--dataset", "tiny", "--root", copy, *TRAINING, "--table", "ablation", "--no-segment"
    )
    folder = copy / "experiments" / "tiny"
    ablation = read(folder / "tables" / "ablation.csv")
    assert not any(column.startswith("segmentation") for _, column in ablation)
    assert ("+ PRC + IR, background by threshold (extension)", "+ CRF") in ablation
    assert not (folder / "tables-backgroundthreshold-seed0" / "cams").exists()  # step 3 takes those of tables-seed0

    oracle = ConfusionMatrix(3)
    for id in TRAIN:
        classes, maps = load_cams(folder / "tables-seed0" / "cams" / f"{id}.npz", 3, (64, 64))
        truth = load_label(copy / "datasets" / "tiny" / "train" / "labels" / f"{id}.png", 3)
        expected = np.zeros_like(truth)
        for y, x in np.argwhere(truth != 0):
            expected[y, x] = max((k for k in classes if k), key=lambda k: maps[list(classes).index(k), y, x])
        oracle.update(truth, expected)
    column = "CAM on the true background (USES THE TRUTH)"
    assert sum(each == column for _, each in ablation) == 4  # every row but the extension's, whose CAMs are the last's
    (value,) = ablation["+ PRC + IR", column]
    assert value == pytest.approx(100 * oracle.scores()["miou"], abs=1e-3)


def test_every_table_has_rows_and_the_default_is_among_them():
    for table in ("main", "ablation", "gamma", "lambda", "tiles", "tau"):
        rows = rows_of(Constants(table=table))
        assert rows and all(isinstance(row, Row) for row in rows)
        defaults = Classification()
        assert any(all(getattr(defaults, key) == value for key, value in row.changes.items()) for row in rows)
    names = [row.name for row in rows_of(Constants(table="ablation"), background=True)]
    assert len(names) == 5 and "extension" in names[-1]


NO_WEIGHTS = Classification(weights="none", train_all=True)


@pytest.mark.parametrize(
    ("constants", "sentence"),
    [
        ({"classification": replace(NO_WEIGHTS, seed=3)}, r"classification\.seed was set, but the tables set it"),
        ({"classification": replace(NO_WEIGHTS, weights="no/file")}, "weights file no/file is missing"),
        ({"classification": replace(NO_WEIGHTS, epochs=0)}, "epochs is 0, but it must be at least 1"),
        ({"pseudo": Pseudo(cams="other")}, r"pseudo\.cams was set, but the tables set it"),
        ({"pseudo": Pseudo(background="threshold"), "table": "ablation"}, r"pseudo\.background is threshold, but"),
        ({"pseudo": Pseudo(bilateral_weight=-1)}, "the weights of the CRF"),
        ({"segmentation": Segmentation(width=7, batch_size=4)}, "width is 7, but it must be a multiple of 4"),
        ({"segment": False}, "segment is False, but the table main"),
        ({"seeds": (1, 1)}, r"seeds is \(1, 1\), but needs different numbers"),
        ({"seeds": (0, -1)}, "seeds is"),
        ({"gammas": ()}, r"gammas is \(\), but needs different numbers"),
        ({"table": "gamma", "gammas": (0.7, 1.5)}, r"gamma is 1\.5, but it must lie between 0 and 0\.999"),
        ({"table": "lambda", "ir_weights": (0.1, -1.0)}, r"ir_weight is -1\.0, but it must be 0 or more"),
        ({"table": "tiles", "tiles": (4, 5)}, "tiles is 5, but it must be a square number"),
        ({"table": "tau", "taus": (0.1, 3.0)}, "taus is"),
        ({"scales": (0.0,)}, "scales is"),
    ],
)
def test_constants_are_checked_before_the_first_row(finished, constants, sentence):
    """Not when a later row, or a later step, comes to them after hours."""
    dataset = load_dataset("tiny", finished)
    with pytest.raises(UserError, match=sentence):
        check_constants(Constants(**{"classification": NO_WEIGHTS} | constants), dataset)


def test_the_two_protocols_stand_beside_each_other(copy, run_script):
    """The released one chooses the epoch by the maps, so "+ PRC" needs a training of its own there."""
    common = ["--dataset", "tiny", "--root", copy, *TRAINING, "--table", "lambda", "--ir-weights", 0.0]
    for protocol in ("clean", "released"):
        table = run_script("reproduce_tables.py", *common, "--protocol", protocol).stdout
        assert f"Protocol: {protocol}." in table and "epochs 1, batch_size 4" in table
    folder = copy / "experiments" / "tiny"
    assert (folder / "tables" / "lambda.csv").exists() and (folder / "tables-released" / "lambda.csv").exists()
    assert not (folder / "tables-ir_weight0-seed0" / "classifier").exists()
    assert (folder / "tables-released-ir_weight0-seed0" / "classifier" / "model.pt").exists()
    other = run_script("reproduce_tables.py", *common, "--classification.lr", 0.001, fails=True)
    assert "choose another --experiment" in other.stderr
    run_script("reproduce_tables.py", *common, "--classification.lr", 0.001, "--experiment", "slow")
    assert (folder / "slow" / "lambda.md").exists()


def test_perfect_regions_are_the_components_of_each_class():
    truth = np.array([[0, 0, 1], [1, 0, 1], [1, 255, 255]], np.uint8)
    found = {tuple(map(tuple, np.argwhere(mask))) for mask in perfect_regions(truth, 3).unpack()}
    assert found == {((0, 0), (0, 1), (1, 1)), ((0, 2), (1, 2)), ((1, 0), (2, 0))}
    assert len(perfect_regions(np.full((2, 2), 255, np.uint8), 3)) == 0


def test_spread_is_the_standard_deviation_over_seeds():
    assert show([]) == "" and show([3.0]) == "3.00" and show([1.0, 3.0]) == "2.00 ± 1.41"


def test_thresholded_background_is_one_value_between_the_other_classes():
    maps = np.zeros((3, 4, 4), np.float32)
    maps[0], maps[1, :2], maps[2, 2:] = 0.9, 0.8, 0.1
    found = thresholded_background(np.array([0, 2, 5]), maps, 0)
    assert (found[1:] == maps[1:]).all() and np.unique(found[0]).size == 1
    assert 0.1 <= found[0, 0, 0] < 0.8  # the strong class beats it, the weak one does not
    assert (found.argmax(0)[:2] == 1).all()
    alone = thresholded_background(np.array([0]), maps[:1], 0)
    assert (alone == maps[:1]).all()  # nothing but background: left as it is
