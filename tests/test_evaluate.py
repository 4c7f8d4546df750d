"""evaluate_miou.py as a user runs it, on a small made experiment."""

import csv
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest

import evaluate_miou
from report import score_tables
from report.summary import Summary
from tests.experiments import CLASSES, COLOURS, EVIL, STAGES, make_experiment, scored, scores_of
from tools.command import UserError
from tools.dataset import load_dataset
from tools.labels import load_label, save_label
from tools.map_files import load_maps, save_maps

CAMS, SCORES = "experiments/tiny/run/cams", "experiments/tiny/run/scores"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_experiment(tmp_path_factory.mktemp("root"))


@pytest.fixture
def root(made, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(made, tmp_path / "root")


def evaluate(root, **constants):
    """Step 8 in this process, which has torch loaded already."""
    values = {"dataset": "tiny", "experiment": "run", "root": root, "workers": 0} | constants
    evaluate_miou.main(evaluate_miou.Constants(**values))


def labels_of(folder):
    return np.stack([load_label(folder / f"{id}.png", 4) for id in "abcde"])


def iou_of(root, folder, split, chosen=slice(None), left_out=(3,)):
    truth, prediction = labels_of(root / f"datasets/tiny/{split}/labels")[chosen], labels_of(folder)[chosen]
    counted = (truth != 255) & ~np.isin(truth, left_out)
    hits = [(counted & (truth == k) & (prediction == k)).sum() for k in range(4) if k not in left_out]
    unions = [(counted & ((truth == k) | (prediction == k))).sum() for k in range(4) if k not in left_out]
    return np.divide(hits, unions).tolist()


@pytest.fixture(scope="module")
def evaluated(made, run_script):
    result = run_script("evaluate_miou.py", "--dataset", "tiny", "--experiment", "run", "--root", made)
    return made, result


def test_scores_of_every_stage(evaluated):
    root, result = evaluated
    summary = scores_of(root)
    run, bound = root / "experiments/tiny/run", root / "experiments/tiny/supervised/segmentation"
    assert [row["stage"] for row in summary["stages"]] == ["cams", *STAGES, "segmentation"]
    for row in summary["stages"][1:]:
        folder = bound if row["experiment"] == "supervised" else run / row["stage"]
        assert row["iou"][:3] == pytest.approx(iou_of(root, folder, row["split"]), abs=1e-12) and row["iou"][3] is None
        assert row["all_classes"]["iou"] == pytest.approx(iou_of(root, folder, row["split"], left_out=()), abs=1e-12)
        assert row["images"] == 5 and not row["partial"]
    reached, most = summary["stages"][4]["miou"], summary["stages"][5]["miou"]
    assert summary["stages"][4]["share_of_supervised"] == pytest.approx(reached / most)
    assert summary["stages"][0]["share_of_supervised"] is None  # no supervised run on the train split
    assert f"| refined segmentation | test | {100 * reached:.2f} |" in result.stdout
    assert all(words in result.stdout for words in ("seed: 3", "resnet18", "made masks", "33.33 (implied)"))
    assert str(run / "scores" / "report.html") in result.stdout.splitlines()[-1]


def test_the_most_frequent_class_and_the_shares_stand_beside_the_scores(evaluated):
    root, result = evaluated
    summary = scores_of(root)
    truth = labels_of(root / "datasets/tiny/test/labels")
    prediction = labels_of(root / "experiments/tiny/run/refined_segmentation")
    for key, ids in (("truth_share", truth), ("predicted_share", prediction)):
        expected = [(ids[truth != 255] == k).mean() for k in range(4)]
        assert summary["stages"][4][key] == pytest.approx(expected, abs=1e-12)
        assert f"{100 * expected[0]:.2f}" in result.stdout.partition("| share of pixels |")[2].splitlines()[2]
    counts = [(truth == k).sum() for k in range(3)]  # clutter does not count
    k = int(np.argmax(counts))
    constant = summary["most_frequent_class"]["test"]
    assert constant["class"] == CLASSES[k] and constant["overall_accuracy"] == pytest.approx(counts[k] / sum(counts))
    assert constant["miou"] == pytest.approx(counts[k] / sum(counts) / 3)
    assert f"every pixel {CLASSES[k]}, the most frequent class | test | {100 * constant['miou']:.2f} |" in result.stdout
    assert "No better than" not in result.stdout and "Not found" not in result.stdout


def test_the_seconds_of_each_step_are_shown(root, capsys):
    for file, seconds in (("run/cams", 12.4), ("run/segmentation", 3.6), ("supervised/segmentation", 5.0)):
        path = root / "experiments/tiny" / file / "run.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": seconds}))
    evaluate(root)
    table = capsys.readouterr().out.partition("| made | device | seconds |")[2]
    assert "| cams | cpu | 12 |" in table and "| segmentation, fully supervised | cpu | 5 |" in table
    assert "| all |  | 27 |" in table  # with four steps of 1.5 s


def test_a_map_of_one_class_is_called_no_better_than_that(root, capsys):
    for id in "abcde":
        save_label(root / f"experiments/tiny/run/refined_segmentation/{id}.png", np.zeros((32, 32), np.uint8), COLOURS)
    evaluate(root)
    printed = capsys.readouterr().out
    assert printed.count("No better than one class everywhere: refined segmentation, test split") == 1
    sentence = printed.partition("Not found: refined segmentation, test split")[2].splitlines()[0]
    assert f"{CLASSES[1]} ({100 * scores_of(root)['stages'][4]['truth_share'][1]:.2f} %" in sentence
    assert CLASSES[0] not in sentence and CLASSES[3] not in sentence  # clutter does not count


def test_files_of_scores(evaluated):
    """Every column of scores.csv holds the fraction of scores.json; samples.json names the last result."""
    root, result = evaluated
    pictures = {f"{name}_{split}.png" for name in ("confusion", "contact_sheet") for split in ("train", "test")}
    assert pictures <= {path.name for path in (root / SCORES).iterdir()}
    with open(root / SCORES / "scores.csv", newline="") as file:
        row = list(csv.DictReader(file))[3]
    stage = scores_of(root)["stages"][3]
    assert float(row[f"iou_{EVIL}"]) == stage["iou"][1]
    for key in ("miou", "share_of_supervised", "miou_all_classes", "mean_f1", "overall_accuracy", "kappa", "images"):
        assert float(row[key]) == stage[key]
    assert (root / SCORES / "scores.md").read_text().strip() in result.stdout
    samples = json.loads((root / SCORES / "samples.json").read_text())
    results = {split: {sample["result"] for sample in samples[split]} for split in samples}
    assert results == {"train": {"refined pseudo-label"}, "test": {"refined segmentation"}}


def test_a_further_column_of_the_scores_is_one_line(root, monkeypatch):
    """In the page, in scores.md and in scores.csv."""
    columns = score_tables.score_columns
    added = score_tables.Column("one more score", "kappa")
    monkeypatch.setattr(score_tables, "score_columns", lambda dataset: [*columns(dataset), added])
    evaluate(root, samples=0)
    kappa = f"{100 * scores_of(root)['stages'][4]['kappa']:.2f}"
    table, page, columns = ((root / SCORES / f).read_text() for f in ("scores.md", "report.html", "scores.csv"))
    assert re.search(rf"refined segmentation \| test .* 5 \| {kappa} \|\n", table)
    assert '<th scope="col">one more score</th></tr>' in page and f"<td>5</td><td>{kappa}</td></tr>" in page
    assert columns.splitlines()[0].count("kappa") == 2


def test_a_damaged_run_json_ends_step_8_with_its_name(root):
    (root / "experiments/tiny/run/segmentation/run.json").write_bytes(b"[]")
    with pytest.raises(UserError, match=r"segmentation/run\.json is damaged"):
        evaluate(root)


def test_cams_are_scored_by_their_highest_map(evaluated):
    root, labels = evaluated[0], []
    truth = labels_of(root / "datasets/tiny/train/labels")
    for id in "abcde":
        classes, maps = load_maps(root / f"experiments/tiny/run/cams/{id}.npz", 4, truth[0].shape)
        labels.append(classes[maps.argmax(0)])
    row = scores_of(root)["stages"][0]
    accuracy = (truth == np.stack(labels))[truth != 255].mean()
    assert row["all_classes"]["overall_accuracy"] == pytest.approx(accuracy)


def test_bad_files_are_reported_and_the_good_ones_scored(root, run_script):
    folder = root / "experiments/tiny/run/segmentation"
    expected = iou_of(root, folder, "test", slice(3, 5))
    (folder / "a.png").unlink()
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:90])
    save_label(folder / "c.png", np.zeros((32, 30), np.uint8), COLOURS)
    save_maps(root / CAMS / "a.npz", "cams", np.array([0, 7]), [np.ones((2, 2, 2))], (32, 32), np.zeros(4))
    (root / CAMS / "d.npz").write_bytes(b"PK")
    (root / "datasets/tiny/test/sam_masks/e.npz").write_bytes(b"none")
    words = ("--dataset", "tiny", "--experiment", "run", "--root", root, "--workers", 0)
    result = run_script("evaluate_miou.py", *words, fails=True)
    assert result.returncode == 1 and "6 files could not be scored" in result.stderr
    for name in ("segmentation/a", "segmentation/b", "segmentation/c", "cams/a", "cams/d", "sam_masks/e"):
        assert name in result.stderr
    assert "30 x 32" in result.stderr and "segmentation (partial)" in result.stdout
    rows = {row["stage"]: row for row in scores_of(root)["stages"] if row["experiment"] == "run"}
    assert rows["segmentation"]["partial"] and rows["segmentation"]["images"] == 2
    assert rows["segmentation"]["iou"][:3] == pytest.approx(expected, abs=1e-12)
    assert rows["cams"]["images"] == 3 and not rows["refined_segmentation"]["partial"]
    assert "Partial scores" in (root / SCORES / "report.html").read_text()


def test_several_processes_give_the_same_counts(made, monkeypatch):
    dataset = load_dataset("tiny", made)
    chosen = {"stages": ("segmentation",), "workers": 2}
    constants = evaluate_miou.Constants(dataset="tiny", experiment="run", root=made, **chosen)
    counts = []
    for patches in (1, 100):  # in two processes, and in this one
        monkeypatch.setattr(evaluate_miou, "PATCHES_A_PROCESS", patches)
        stages = evaluate_miou.find_stages(dataset, made / "experiments/tiny/run", constants)
        assert evaluate_miou.score(dataset, stages, constants) == []
        counts.append(np.stack([stage.matrix.counts for stage in stages]))
    assert np.array_equal(*counts) and counts[0].sum() == 2 * 5 * 30 * 32


def test_chosen_stages_released_protocol_and_no_train_truth(root, capsys):
    shutil.rmtree(root / "datasets/tiny/train/labels")
    evaluate(root, stages=["segmentation", "pseudo_labels"], protocol="released", samples=0)
    printed = capsys.readouterr().out
    assert "train split is not scored" in printed and "Released protocol" in printed
    rows = scores_of(root)["stages"]
    assert [f"{row['experiment']}/{row['stage']}" for row in rows] == ["run/segmentation", "supervised/segmentation"]
    truth = labels_of(root / "datasets/tiny/test/labels")
    label = labels_of(root / "experiments/tiny/run/segmentation")
    counted = (truth < 3) & (label < 3)
    assert rows[0]["overall_accuracy"] == pytest.approx((truth == label)[counted].mean())
    shutil.rmtree(root / "datasets/tiny/test/labels")
    with pytest.raises(UserError, match=r"test/labels is missing: .*report\.html"):
        evaluate(root, stages=["segmentation"])


@pytest.mark.parametrize(
    ("constants", "words"),
    [
        ({"experiment": "other"}, "other/cams is missing: run step 2, .*experiments .* run, supervised"),
        ({"stages": ["classifier"]}, 'stages holds "classifier"'),
        ({"stages": ["cams_test"]}, "run/cams_test is missing: run step 2, .* --split test"),
        ({"samples": 21}, "samples is 21"),
    ],
)
def test_error_messages(made, constants, words):
    with pytest.raises(UserError, match=words):
        evaluate(made, **constants)


def test_the_papers_figures_stand_at_the_last_stage_and_the_bound(made):
    paper = {"miou": 40.96, "share_of_supervised": 65.66, "supervised": 62.38}
    dataset = replace(load_dataset("tiny", made), paper=paper)
    names = [("run", "segmentation"), ("run", "refined_segmentation"), ("supervised", "segmentation")]
    stages = [scored(*name, "test", np.eye(4, 5, dtype=int).tolist()) for name in names]
    table = score_tables.score_table(Summary(None, dataset, made / "run", {}, set(), [], stages))
    shown = [column for column in table.columns if column.title.startswith("paper")]
    assert [[column.cell(row) for column in shown] for row in table.rows] == [
        ["not published"] * 2,
        ["40.96", "65.66"],
        ["62.38 (implied)", "100"],
        ["–", "–"],
    ]
