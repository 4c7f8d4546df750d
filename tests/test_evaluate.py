"""evaluate_miou.py as a user runs it, on a small made experiment."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

import evaluate_miou
from report import score_tables
from report.summary import Scored, Summary
from tests.experiments import CLASSES, COLOURS, EVIL, STAGES, make_experiment, scores_of
from tools.cams import load_cams, save_cams
from tools.command import UserError
from tools.dataset import load_dataset
from tools.labels import load_label, save_label


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_experiment(tmp_path_factory.mktemp("root"))


@pytest.fixture
def root(made, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(made, tmp_path / "root")


def evaluate(root, **constants):
    """Step 8 in this process, which has torch loaded already."""
    given = {"dataset": "tiny", "experiment": "run", "root": root, "workers": 0} | constants
    evaluate_miou.main(evaluate_miou.Constants(**given))


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
    assert "| 11.11 | 22.22 |" in result.stdout and "33.33 (implied)" in result.stdout
    assert result.stdout.splitlines()[-2].startswith(f"made: {run / 'scores'}, scores of 6 label folders, ")
    assert result.stdout.splitlines()[-1] == f"look at: {run / 'scores' / 'report.html'}"


def test_the_most_frequent_class_and_the_shares_stand_beside_the_scores(evaluated):
    root, result = evaluated
    summary, folder = scores_of(root), root / "experiments/tiny/run/refined_segmentation"
    truth, prediction = (
        np.stack([load_label(place / f"{id}.png", 4) for id in "abcde"])
        for place in (root / "datasets/tiny/test/labels", folder)
    )
    labelled = truth != 255
    row = summary["stages"][4]
    for key, ids in (("truth_share", truth), ("predicted_share", prediction)):
        expected = [(ids[labelled] == k).mean() for k in range(4)]
        assert row[key] == pytest.approx(expected, abs=1e-12)
        assert f"{100 * expected[0]:.2f}" in result.stdout.partition("| share of pixels |")[2].splitlines()[2]
    counts = [(truth == k).sum() for k in range(3)]  # clutter does not count
    k = int(np.argmax(counts))
    constant = summary["most_frequent_class"]["test"]
    assert constant["class"] == CLASSES[k] and constant["overall_accuracy"] == pytest.approx(counts[k] / sum(counts))
    assert constant["miou"] == pytest.approx(counts[k] / sum(counts) / 3) and constant["kappa"] == 0
    title = f"every pixel {CLASSES[k]}, the most frequent class"
    assert f"| {title} | test | {100 * constant['miou']:.2f} |" in result.stdout
    assert "No better than" not in result.stdout and "Not found" not in result.stdout


def test_the_seconds_of_each_step_are_shown(root, capsys):
    for file, seconds in (("run/cams", 12.4), ("run/segmentation", 3.6), ("supervised/segmentation", 5.0)):
        path = root / "experiments/tiny" / file / "run.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": seconds}))
    evaluate(root)
    table = capsys.readouterr().out.partition("| made | device | seconds |")[2]
    assert "| cams | cpu | 12 |" in table and "| segmentation | cpu | 4 |" in table
    assert "| segmentation, fully supervised | cpu | 5 |" in table
    values = [int(line.split("|")[3]) for line in table.splitlines() if line.startswith("| ") and "---" not in line]
    assert abs(sum(values[:-1]) - values[-1]) <= 2


def test_a_map_of_one_class_is_called_no_better_than_that(root, capsys):
    for id in "abcde":
        save_label(root / f"experiments/tiny/run/refined_segmentation/{id}.png", np.zeros((32, 32), np.uint8), COLOURS)
    evaluate(root)
    printed = capsys.readouterr().out
    assert "No better than one class everywhere: refined segmentation, test split, has mIoU" in printed
    assert printed.count("No better than") == 1
    missed = f"{CLASSES[1]} ({100 * scores_of(root)['stages'][4]['truth_share'][1]:.2f} % of the truth)"
    sentence = printed.partition("Not found: refined segmentation, test split, has an IoU below 1 % for ")[2]
    assert sentence.startswith(missed) and CLASSES[0] not in sentence.splitlines()[0]
    assert CLASSES[3] not in sentence.splitlines()[0]  # clutter does not count


def test_report_opens_on_the_last_result_and_shows_two_classes(evaluated):
    samples = json.loads((evaluated[0] / "experiments/tiny/run/scores/samples.json").read_text())
    assert {sample["result"] for sample in samples["train"]} == {"refined pseudo-label"}
    assert {sample["result"] for sample in samples["test"]} == {"refined segmentation"}


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
    constants = evaluate_miou.Constants(
        dataset="tiny", experiment="run", stages=("segmentation",), root=made, workers=2
    )
    counts = []
    for patches in (1, 100):  # in two processes, and in this one
        monkeypatch.setattr(evaluate_miou, "PATCHES_A_PROCESS", patches)
        folders = evaluate_miou.find_folders(dataset, made / "experiments/tiny/run", constants)
        assert evaluate_miou.score(dataset, folders, constants) == []
        counts.append(np.stack([folder.matrix.counts for folder in folders]))
    assert np.array_equal(*counts) and counts[0].sum() == 2 * 5 * 30 * 32


def test_chosen_stages_released_protocol_and_no_train_truth(root, capsys):
    shutil.rmtree(root / "datasets/tiny/train/labels")
    evaluate(root, stages=["segmentation", "pseudo_labels"], protocol="released", samples=0)
    printed = capsys.readouterr().out
    assert "so the train split is not scored" in printed and "Released protocol" in printed
    rows = scores_of(root)["stages"]
    assert [f"{row['experiment']}/{row['stage']}" for row in rows] == ["run/segmentation", "supervised/segmentation"]
    truth, label = (
        np.stack([load_label(folder / f"{id}.png", 4) for id in "abcde"])
        for folder in (root / "datasets/tiny/test/labels", root / "experiments/tiny/run/segmentation")
    )
    counted = (truth < 3) & (label < 3)
    assert rows[0]["overall_accuracy"] == pytest.approx((truth == label)[counted].mean())


@pytest.mark.parametrize(
    ("constants", "words"),
    [
        ({"experiment": "other"}, "the experiments of this data set are empty, run, supervised"),
        ({"experiment": "other"}, "other/cams is missing: run step 2, python infer_classification.py --dataset tiny"),
        ({"experiment": "empty"}, "empty/cams is missing: run step 2, python infer_classification.py --dataset tiny"),
        ({"stages": ["classifier"]}, 'stages holds "classifier"'),
        ({"stages": ["cams_test"]}, "run/cams_test is missing: run step 2, .* --split test"),
        ({"experiment": "../run"}, 'experiment is "../run"'),
        ({"samples": 21}, "samples is 21, but it must be at most 20"),
        ({"workers": -1}, "workers is -1, but it must be at least 0"),
    ],
)
def test_error_messages(made, constants, words):
    (made / "experiments" / "tiny" / "empty").mkdir(exist_ok=True)
    with pytest.raises(UserError, match=words) as raised:
        evaluate(made, **constants)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"started": 1}'],
    ids=["empty", "list", "utf-8", "deep", "keys"],
)
def test_a_damaged_account_is_one_sentence(root, content):
    file = root / "experiments/tiny/run/segmentation/run.json"
    file.write_bytes(content)
    with pytest.raises(UserError) as raised:
        evaluate(root)
    assert str(raised.value).startswith(f"{file} is damaged") and "\n" not in str(raised.value)


def test_no_truth_at_all(root):
    for split in ("train", "test"):
        shutil.rmtree(root / "datasets" / "tiny" / split / "labels")
    with pytest.raises(UserError, match="train/labels is missing: scores need label maps of the truth; without them"):
        evaluate(root)


def test_cams_of_other_classes_are_reported(root):
    file, maps = root / "experiments/tiny/run/cams/a.npz", [np.ones((2, 2, 2))]
    save_cams(file, np.array([0, 7]), maps, (32, 32), np.zeros(4))
    with pytest.raises(UserError, match=r"cams/a\.npz cannot be read .* whole numbers from 0 to 3"):
        evaluate(root)


def test_the_papers_figures_stand_at_the_last_stage_and_the_bound(made):
    dataset = replace(
        load_dataset("tiny", made), paper={"miou": 40.96, "share_of_supervised": 65.66, "supervised": 62.38}
    )
    counts = np.eye(4, 5, dtype=int).tolist()
    stages = [
        Scored(
            experiment=experiment,
            stage=stage,
            title=stage,
            split=split,
            images=1,
            partial=False,
            made=("", 0),
            is_bound=experiment == "supervised",
            confusion=counts,
        )
        for experiment, stage, split in (
            ("run", "pseudo_labels", "train"),
            ("run", "segmentation", "test"),
            ("run", "refined_segmentation", "test"),
            ("supervised", "segmentation", "test"),
        )
    ]
    titles, rows = score_tables.table(Summary(None, dataset, made / "run", {}, set(), [], stages=stages))
    first = titles.index("paper: mIoU")
    assert [cells[first : first + 2] for cells in rows] == [
        ["not published"] * 2,
        ["not published"] * 2,
        ["40.96", "65.66"],
        ["62.38 (implied)", "100"],
        ["–", "–"],
        ["–", "–"],
    ]
