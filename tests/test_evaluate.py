"""evaluate_miou.py as a user runs it, on a small made experiment."""

import csv
import shutil

import numpy as np
import pytest

import evaluate_miou
from report import score_tables as summaries
from tests.experiments import COLOURS, EVIL, STAGES, make_experiment, scores_of
from tools.cams import load_cams
from tools.dataset import load_dataset
from tools.labels import load_label, save_label


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_experiment(tmp_path_factory.mktemp("root"))


@pytest.fixture
def root(made, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(made, tmp_path / "root")


def iou_of(root, folder, split, ids="abcde", left_out=(3,)):
    pairs = [
        (load_label(root / f"datasets/tiny/{split}/labels/{id}.png", 4), load_label(folder / f"{id}.png", 4))
        for id in ids
    ]
    truth, prediction = (np.concatenate([pair[side].ravel() for pair in pairs]) for side in (0, 1))
    counted = (truth != 255) & ~np.isin(truth, left_out)
    truth, prediction = truth[counted], prediction[counted]
    return [
        ((truth == k) & (prediction == k)).sum() / ((truth == k) | (prediction == k)).sum()
        for k in range(4)
        if k not in left_out
    ]


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
    assert "seed: 3" in result.stdout and "resnet18" in result.stdout and "made masks" in result.stdout
    assert (
        "11.11" not in result.stdout and "paper: mIoU" not in result.stdout
    )  # a user's own figures are not the paper's


def test_files_of_scores(evaluated):
    folder = evaluated[0] / "experiments/tiny/run/scores"
    assert {path.name for path in folder.iterdir()} == {
        "scores.json",
        "scores.csv",
        "scores.md",
        "report.html",
        "samples.json",
        "confusion_train.png",
        "confusion_test.png",
        "contact_sheet_train.png",
        "contact_sheet_test.png",
    }
    with open(folder / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[3][f"iou_{EVIL}"]) == scores_of(evaluated[0])["stages"][3]["iou"][1]
    assert (folder / "scores.md").read_text().strip() in evaluated[1].stdout


def test_cams_are_scored_by_their_highest_map(evaluated):
    root, truths, labels = evaluated[0], [], []
    for id in "abcde":
        truths.append(load_label(root / f"datasets/tiny/train/labels/{id}.png", 4))
        classes, maps = load_cams(root / f"experiments/tiny/run/cams/{id}.npz", 4, truths[-1].shape)
        labels.append(classes[maps.argmax(0)])
    truth, label = np.stack(truths), np.stack(labels)
    row = scores_of(root)["stages"][0]
    assert row["all_classes"]["overall_accuracy"] == pytest.approx((truth == label)[truth != 255].mean())


def test_bad_files_are_reported_and_the_good_ones_scored(root, run_script):
    folder = root / "experiments/tiny/run/segmentation"
    (folder / "a.png").unlink()
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:90])
    save_label(folder / "c.png", np.zeros((32, 30), np.uint8), COLOURS)
    (root / "experiments/tiny/run/cams/d.npz").write_bytes(b"PK")
    (root / "datasets/tiny/test/sam_masks/e.npz").write_bytes(b"none")
    result = run_script(
        "evaluate_miou.py", "--dataset", "tiny", "--experiment", "run", "--root", root, "--workers", 0, fails=True
    )
    assert result.returncode == 1 and "5 files could not be scored" in result.stderr
    for name in ("segmentation/a.png", "segmentation/b.png", "segmentation/c", "cams/d.npz", "sam_masks/e.npz"):
        assert name in result.stderr
    assert "30 x 32" in result.stderr and "segmentation (partial)" in result.stdout
    rows = {row["stage"]: row for row in scores_of(root)["stages"] if row["experiment"] == "run"}
    assert rows["segmentation"]["partial"] and rows["segmentation"]["images"] == 2
    assert rows["segmentation"]["iou"][:3] == pytest.approx(iou_of(root, folder, "test", "de"), abs=1e-12)
    assert rows["cams"]["images"] == 4 and not rows["refined_segmentation"]["partial"]
    assert "Partial scores" in (root / "experiments/tiny/run/scores/report.html").read_text()


def test_several_processes_give_the_same_counts(made, monkeypatch):
    dataset = load_dataset("tiny", made)
    constants = evaluate_miou.Constants("tiny", "run", stages=("segmentation",), root=made, workers=2)
    counts = []
    for patches in (1, 100):  # in two processes, and in this one
        monkeypatch.setattr(evaluate_miou, "PATCHES_A_PROCESS", patches)
        stages = evaluate_miou.find_stages(dataset, made / "experiments/tiny/run", constants)
        assert evaluate_miou.score(dataset, "test", stages, constants) == []
        counts.append(np.stack([stage.matrix.counts for stage in stages]))
    assert np.array_equal(*counts) and counts[0].sum() == 2 * 5 * 30 * 32


def test_chosen_stages_released_protocol_and_no_train_truth(root, run_script):
    shutil.rmtree(root / "datasets/tiny/train/labels")
    result = run_script(
        "evaluate_miou.py",
        "--dataset",
        "tiny",
        "--experiment",
        "run",
        "--root",
        root,
        "--workers",
        0,
        "--stages",
        "segmentation",
        "pseudo_labels",
        "--protocol",
        "released",
        "--samples",
        0,
    )
    assert "so the train split is not scored" in result.stdout and "Released protocol" in result.stdout
    rows = scores_of(root)["stages"]
    assert [f"{row['experiment']}/{row['stage']}" for row in rows] == ["run/segmentation", "supervised/segmentation"]
    truth, label = (
        np.stack([load_label(folder / f"{id}.png", 4) for id in "abcde"])
        for folder in (root / "datasets/tiny/test/labels", root / "experiments/tiny/run/segmentation")
    )
    counted = (truth < 3) & (label < 3)
    assert rows[0]["overall_accuracy"] == pytest.approx((truth == label)[counted].mean())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--experiment", "other"], "experiments/tiny/other is missing"),
        (["--experiment", "run", "--stages", "classifier"], 'stages holds "classifier"'),
        (["--experiment", "run", "--stages", "cams_test"], "cams_test is missing: run step 2"),
        (["--experiment", "../run"], 'experiment is "../run"'),
    ],
)
def test_error_messages(made, run_script, arguments, words):
    result = run_script("evaluate_miou.py", "--dataset", "tiny", "--root", made, *arguments, fails=True)
    assert words in result.stderr.replace("\n", " ") and len(result.stderr.strip().splitlines()) == 1


def test_the_papers_figures_stand_at_the_last_stage_and_the_bound():
    row = {
        "title": "segmentation",
        "split": "test",
        "is_bound": False,
        "partial": False,
        "stale": False,
        "images": 1,
    } | dict.fromkeys(("miou", "miou_all_classes", "mean_f1", "overall_accuracy", "kappa", "share_of_supervised"), 0.5)
    summary = {
        "classes": ["a"],
        "paper": {"miou": 40.96, "share_of_supervised": 65.66, "supervised": 62.38},
        "stages": [row | {"split": "train"}, row, dict(row), row | {"is_bound": True}],
    }
    titles, rows = summaries.table(summary)
    first = titles.index("paper: mIoU")
    assert [cells[first : first + 2] for cells in rows] == [
        ["not published"] * 2,
        ["not published"] * 2,
        ["40.96", "65.66"],
        ["62.38 (implied)", "100"],
    ]
