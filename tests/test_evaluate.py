"""evaluate_miou.py as a user runs it, on a small made experiment, and the report that it writes."""

import csv
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

import evaluate_miou
from PRC_SAM.masks import pack_masks, save_masks
from tools import report
from tools.cams import load_cams, save_cams
from tools.dataset import load_dataset
from tools.labels import load_label, save_label

EVIL = "<script>alert('x')</script>"
CLASSES = ["road", EVIL, "roof", "clutter"]
COLOURS = np.array([[255, 255, 255], [0, 0, 255], [0, 255, 0], [255, 0, 0]], np.uint8)
DESCRIPTION = f"""
title = "a | title & {EVIL}"
patch_size = 32
classes = [{", ".join(f'{{name = "{CLASSES[k]}", colour = {COLOURS[k].tolist()}}}' for k in range(4))}]
left_out_of_mean = ["clutter"]
[paper]
miou = 11.11
share_of_supervised = 22.22
supervised = 33.33
"""
STAGES = {
    "pseudo_labels": "train",
    "refined_pseudo_labels": "train",
    "segmentation": "test",
    "refined_segmentation": "test",
}


def account(folder, split, **notes):
    folder.mkdir(parents=True, exist_ok=True)
    constants = {"split": split, "seed": 3, "backbone": "resnet18", "protocol": "clean"}
    (folder / "run.json").write_text(
        json.dumps(
            {
                "constants": constants,
                "notes": notes,
                "started": folder.name,
                "finished": True,
                "seconds": 1.5,
                "device": "cpu",
            }
        )
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A data set of 5 + 5 patches and the experiments `run` and `supervised`, with random errors."""
    root, rng = tmp_path_factory.mktemp("root"), np.random.default_rng(0)
    dataset, experiments = root / "datasets" / "tiny", root / "experiments" / "tiny"
    dataset.mkdir(parents=True)
    (dataset / "dataset.toml").write_text(DESCRIPTION)
    for split in ("train", "test"):
        for id in "abcde":
            truth = rng.integers(0, 4, (4, 4)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
            truth[:2] = 255
            for part in ("images", "labels"):
                (dataset / split / part).mkdir(parents=True, exist_ok=True)
            image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(image).save(dataset / split / "images" / f"{id}.png")
            save_label(dataset / split / "labels" / f"{id}.png", truth, COLOURS)
            save_masks(dataset / split / "sam_masks" / f"{id}.npz", pack_masks(rng.random((3, 32, 32)) > 0.5))
            folders = [experiments / "run" / name for name, of in STAGES.items() if of == split]
            folders += [experiments / "supervised" / "segmentation"] if split == "test" else []
            for folder in folders:
                wrong = (rng.random(truth.shape) < 0.4) | (truth == 255)
                save_label(folder / f"{id}.png", np.where(wrong, rng.integers(0, 4, truth.shape), truth), COLOURS)
    for id in "abcde":
        save_cams(experiments / "run" / "cams" / f"{id}.npz", np.array([0, 2]), [rng.random((2, 2, 2))], (32, 32))
    account(experiments / "run" / "cams", "train")
    for name, split in STAGES.items():
        account(experiments / "run" / name, split, **({"stand_in": "made masks"} if "refined" in name else {}))
    account(experiments / "supervised" / "segmentation", "test")
    account(experiments / "run" / "classifier", "train")
    (experiments / "run" / "classifier" / "log.jsonl").write_text(
        '{"epoch": 1, "step": 9, "loss": 2.5, "lr": 0.1}\n{"epoch": 2, "step": 18, "loss": NaN, "lr": 0.05}\n'
        '{"epoch": 3, "step": 27, "loss": 0.5, "classification": 0.25, "lr": 0.0}\n{"epoch": 4, "lo'
    )
    return root


@pytest.fixture
def root(made, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(made, tmp_path / "root")


def scores_of(root, experiment="run"):
    return json.loads((root / "experiments" / "tiny" / experiment / "scores" / "scores.json").read_text())


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
    assert "11.11" not in result.stdout and "not published" in result.stdout  # a user's own figures are not the paper's


def test_files_of_scores(evaluated):
    folder = evaluated[0] / "experiments/tiny/run/scores"
    assert {path.name for path in folder.iterdir()} == {
        "scores.json",
        "scores.csv",
        "scores.md",
        "report.html",
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
        classes, maps = load_cams(root / f"experiments/tiny/run/cams/{id}.npz")
        truths.append(load_label(root / f"datasets/tiny/train/labels/{id}.png", 4))
        labels.append(classes[maps.argmax(0)])
    truth, label = np.stack(truths), np.stack(labels)
    row = scores_of(root)["stages"][0]
    assert row["all_classes"]["overall_accuracy"] == pytest.approx((truth == label)[truth != 255].mean())


def test_report_is_one_safe_file(evaluated):
    page = (evaluated[0] / "experiments/tiny/run/scores/report.html").read_text()
    assert len(page.encode()) < 5_000_000
    assert not re.search(r"(https?:)?//\w", re.sub(r"data:image/\w+;base64,[\w+/=]+", "", page))
    assert re.findall(r"<(?:link|iframe|object|base|form)\b", page) == []
    assert EVIL not in page and "alert(" in page and page.count("<script>") == 1
    sources = re.findall(r'src="([^"]{0,30})', page)
    assert sources and all(re.match("data:image/(png|jpeg);base64,", source) for source in sources)
    assert all('alt="' in tag for tag in re.findall(r"<img [^>]*>", page))
    for words in (
        "A stand-in was used: made masks",
        "CAM of road",
        "regions",
        "best, train split",
        "worst, test split",
        "classifier: loss",
        "classifier: classification",
        "prefers-color-scheme: dark",
        "@media print",
    ):
        assert words in page, words
    assert "classifier: lr" not in page and "nan" not in " ".join(re.findall(r'points="([^"]*)"', page))


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_report_in_a_browser(evaluated, tmp_path):
    """No console error; choosing a picture and moving the slider change the overlay."""
    page = (evaluated[0] / "experiments/tiny/run/scores/report.html").read_text()
    probe = """<script>const s = document.querySelector(".sample"), b = s.querySelectorAll("button");
      b[1].click(); s.querySelector("input").value = 25; s.querySelector("input").dispatchEvent(new Event("input"));
      const o = s.querySelectorAll(".stack img")[1];
      document.title = "probe " + o.style.opacity + " " + (o.src === b[1].firstChild.src);</script>"""
    (tmp_path / "page.html").write_text(page.replace("</body>", probe + "</body>"))
    result = subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            "--dump-dom",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"file://{tmp_path / 'page.html'}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in result.stderr
    assert re.search(r"<title>probe 0\.25 true</title>", result.stdout)


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
    row = {"title": "segmentation", "split": "test", "is_bound": False, "partial": False, "images": 1} | dict.fromkeys(
        ("miou", "miou_all_classes", "mean_f1", "overall_accuracy", "kappa", "share_of_supervised"), 0.5
    )
    summary = {
        "classes": ["a"],
        "paper": {"miou": 40.96, "share_of_supervised": 65.66, "supervised": 62.38},
        "stages": [row | {"split": "train"}, row, dict(row), row | {"is_bound": True}],
    }
    titles, rows = report.table(summary)
    first = titles.index("paper: mIoU")
    assert [cells[first : first + 2] for cells in rows] == [
        ["not published"] * 2,
        ["not published"] * 2,
        ["40.96", "65.66"],
        ["62.38 (implied)", "100"],
    ]


@pytest.mark.parametrize("count", [0, 1, 2, 4, 9])
def test_choice_of_best_median_and_worst(count):
    scores = {str(number): number / 10 for number in range(count)} | {"none": float("nan")}
    chosen = report.choose(scores, 2)
    ids = [id for _, id in chosen]
    assert len(set(ids)) == len(ids) and "none" not in ids and len(ids) == min(count, 6 if count > 6 else count)
    if count == 9:
        assert [kind for kind, _ in chosen] == ["best"] * 2 + ["median"] * 2 + ["worst"] * 2
        assert ids == ["8", "7", "5", "4", "1", "0"]


def test_a_page_never_grows_beyond_its_limit(evaluated, tmp_path):
    """Samples that do not fit are left out, and the page says so."""
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    pictures = {f"p{k}": noise for k in range(12)}
    samples = [report.sample(str(number), "test", "best", 0.5, pictures) for number in range(12)]
    dataset = load_dataset("tiny", evaluated[0])
    report.write_report(tmp_path / "report.html", dataset, scores_of(evaluated[0]), {}, [], samples)
    page = (tmp_path / "report.html").read_text()
    assert len(page) < 5_000_000 and "more were chosen" in page and page.count('class="sample"') >= 3
