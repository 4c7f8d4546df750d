"""report.html: one safe file, as evaluate_miou.py writes it and as every step renews it."""

import html
import json
import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest

from report import page as report
from report.patch_pictures import choose, sample
from tests.experiments import CLASSES, EVIL, STAGES, make_experiment, scores_of
from tests.steps import STEPS, experiment, step
from tools.dataset import load_dataset
from tools.labels import load_label
from tools.masks import load_masks

RUN = "experiments/tiny/run"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, run_script):
    root = make_experiment(tmp_path_factory.mktemp("root"))
    run_script("evaluate_miou.py", "--dataset", "tiny", "--experiment", "run", "--root", root, "--workers", 0)
    return root


@pytest.fixture
def root(evaluated, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(evaluated, tmp_path / "root")


def page_of(root):
    return (root / RUN / "scores" / "report.html").read_text()


def refresh(root, step, process=0):
    report.refresh(SimpleNamespace(folder=root / RUN / step, process=process), load_dataset("tiny", root), load_masks)


def panels_of(page, split):
    """The titles of the pictures of each sample of a split."""
    found = re.findall(rf'<section class="sample"><h3>\w+, {split} split: .*?</section>', page, re.S)
    return [re.findall(r"([^>]*)</button>", section) for section in found]


def test_report_is_one_safe_file(evaluated):
    page = page_of(evaluated)
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
    """No console error; the pictures, the slider and the pointer do what the page says, and nothing sticks out."""
    page = page_of(evaluated)
    probe = """<script>const s = document.querySelector(".sample"), input = s.querySelector("input");
      const truth = [...s.querySelectorAll("button")].find(each => each.textContent === "truth");
      const stack = s.querySelector(".stack"), above = stack.querySelectorAll("img")[1];
      truth.click();
      input.value = 25;
      input.dispatchEvent(new Event("input"));
      above.decode().then(() => {
        const box = above.getBoundingClientRect(), fits = document.documentElement.scrollWidth <= innerWidth;
        const place = { clientX: box.x + box.width / 2 + 1, clientY: box.y + box.height / 2 + 1 };
        stack.dispatchEvent(new PointerEvent("pointermove", place));
        document.title = JSON.stringify([above.style.opacity, above.src === truth.firstChild.src, fits,
                                         s.querySelector(".under").textContent]);
      });</script>"""
    (tmp_path / "page.html").write_text(page.replace("</body>", probe + "</body>"))
    result = subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            "--virtual-time-budget=5000",
            "--window-size=500,900",
            "--dump-dom",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"file://{tmp_path / 'page.html'}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in result.stderr
    id = re.search('<section class="sample"><h3>best, train split: (.)</h3>', page)[1]
    name = CLASSES[load_label(evaluated / f"datasets/tiny/train/labels/{id}.png", 4)[16, 16]]
    title = html.unescape(re.search("<title>(.*?)</title>", result.stdout)[1])
    assert json.loads(title) == ["0.25", True, True, name]


def test_steps_renew_the_page_without_the_truth(root, capfd):
    """What is there is shown, what is not is named with its step, and no pixel label is opened."""
    shutil.rmtree(root / RUN / "scores")
    for split in ("train", "test"):
        shutil.rmtree(root / "datasets" / "tiny" / split / "labels")
    names = ["cams", *STAGES]
    for name in names:
        (root / RUN / name).rename(root / name)
    refresh(root, "classifier")
    page = page_of(root)
    assert "classifier: loss" in page and "resnet18" in page and 'class="sample"' not in page
    assert [f"not made yet: step {step}" in page for step in range(1, 8)] == [False] + [True] * 6
    shown = ["image", "CAM of road", "CAM of roof", "CAM, argmax", "pseudo-label", "regions", "refined pseudo-label"]
    for count, name in enumerate(names, 1):
        (root / name).rename(root / RUN / name)
        refresh(root, name)
        titles = panels_of(page_of(root), "train")
        assert len(titles) == 3 and all("truth" not in found and "errors" not in found for found in titles)
        assert titles[0] == shown[: {1: 4, 2: 5}.get(count, 7)]
    assert panels_of(page_of(root), "test")[0] == ["image", "segmentation", "regions", "refined segmentation"]
    assert page_of(root).count("not made yet") == 1  # step 5, which this experiment lacks
    assert capfd.readouterr() == ("", "")


def test_scores_stay_while_they_hold_and_are_marked_after(root):
    before = page_of(root)
    assert panels_of(before, "train")[0][-2:] == ["truth", "errors"]
    refresh(root, "classifier")
    assert page_of(root) == before  # not a byte
    file = root / RUN / "segmentation" / "run.json"
    file.write_text(file.read_text().replace('"started": "segmentation"', '"started": "later"'))
    refresh(root, "segmentation")
    page = page_of(root)
    assert "segmentation (older)" in page and "Older scores: segmentation changed" in page
    assert "pseudo-label (older)" not in page and panels_of(page, "train") == panels_of(before, "train")
    assert all("truth" not in titles for titles in panels_of(page, "test"))


def test_what_an_older_step_fed_is_older_too():
    """At any distance, and across the data set's masks."""
    runs = {
        "classifier": {"started": "1"},
        "cams": {"started": "2", "inputs": {"classifier": "1"}},
        "sam_masks, train split": {"started": "0"},
        "pseudo_labels": {"started": "3", "inputs": {"cams": "2"}},
        "refined_pseudo_labels": {"started": "4", "inputs": {"pseudo_labels": "3", "sam_masks": "0"}},
    }
    assert not any(report.outdated(name, runs) for name in runs)
    again = runs | {"classifier": {"started": "9"}}
    assert [report.outdated(name, again) for name in runs] == [False, True, False, True, True]
    again = runs | {"sam_masks, train split": {"started": "9"}}
    assert [name for name in runs if report.outdated(name, again)] == ["refined_pseudo_labels"]
    elsewhere = runs["cams"] | {"inputs": {"classifier": "7"}, "constants": {"classifier": "other"}}
    assert not report.outdated("pseudo_labels", runs | {"cams": elsewhere})


def test_a_page_that_cannot_be_renewed_costs_one_line(root, capsys):
    shutil.rmtree(root / RUN / "scores")
    (root / RUN / "scores").write_text("a file where a folder should be")
    refresh(root, "cams")
    assert re.fullmatch(r"cams is done, but its report could not be renewed \(.*\)\n", capsys.readouterr().err)
    (root / RUN / "scores").unlink()
    refresh(root, "cams", process=1)  # of several processes the first alone writes
    assert not (root / RUN / "scores").exists()


@pytest.mark.parametrize("count", [0, 1, 2, 4, 9])
def test_choice_of_best_median_and_worst(count):
    scores = {str(number): number / 10 for number in range(count)} | {"none": float("nan")}
    chosen = choose(scores, 2)
    ids = [id for _, id in chosen]
    assert len(set(ids)) == len(ids) and "none" not in ids and len(ids) == min(count, 6 if count > 6 else count)
    if count == 9:
        assert [kind for kind, _ in chosen] == ["best"] * 2 + ["median"] * 2 + ["worst"] * 2
        assert ids == ["8", "7", "5", "4", "1", "0"]
        assert choose(dict.fromkeys("abc", 1.0), 1, {"b": 3, "c": 2})[0] == ("best", "b")  # the one that shows most


def test_a_page_never_grows_beyond_its_limit(evaluated, tmp_path):
    """Samples that do not fit are left out, and the page says so."""
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    pictures = {f"p{k}": noise for k in range(12)}
    samples = [sample(str(number), "test", "best", 0.5, pictures) for number in range(12)]
    dataset = load_dataset("tiny", evaluated)
    report.write_report(tmp_path, dataset, scores_of(evaluated), {}, samples)
    page = (tmp_path / "scores" / "report.html").read_text()
    assert len(page) < 5_000_000 and "more were chosen" in page and page.count('class="sample"') >= 3


def test_every_step_renews_the_page(copy, capfd):
    for script in STEPS:
        page = experiment(copy) / "scores" / "report.html"
        page.unlink()
        step(script, copy)
        assert "not made yet: step" not in page.read_text() and 'class="sample"' in page.read_text(), script
    assert "could not be renewed" not in capfd.readouterr().err
